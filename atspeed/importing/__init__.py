"""Imports a Hugging Face checkpoint of a generative recommender as a bundle.

`atspeed/importing/bundle.py` holds the order of the steps. Everything that can be refused is read before the weights are.
"""
