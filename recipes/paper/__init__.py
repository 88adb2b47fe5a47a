"""The paper's runs: its models, its way of embedding, its tables beside what is measured here."""
