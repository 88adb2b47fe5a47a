"""Pictures: decoded when they are needed, wherever they lie."""
