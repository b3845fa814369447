"""The site: data, training, policy, the Flower client side."""
