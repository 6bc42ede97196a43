"""The comparison of exported graphs with the model that they were made from."""
