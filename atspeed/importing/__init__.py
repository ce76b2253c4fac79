"""Imports a Hugging Face checkpoint of a generative recommender as a bundle.

`atspeed/importing/bundle.py` holds the order of the steps. `reading.py` reads all that can be refused before the weights.
"""
