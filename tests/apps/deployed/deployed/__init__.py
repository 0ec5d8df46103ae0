"""An app that is shipped, signed and never run."""
