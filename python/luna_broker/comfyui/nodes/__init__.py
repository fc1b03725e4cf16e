"""The node classes: they declare inputs and call what does the work."""
