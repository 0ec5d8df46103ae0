"""quickstart-numpy: a Flower app that needs nothing but NumPy."""
