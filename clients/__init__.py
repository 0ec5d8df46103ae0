"""Where data lives: loaders, local training and the client application."""
