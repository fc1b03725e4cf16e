"""What the broker is measured against. Each module is a client process; the C sources are its servers."""
