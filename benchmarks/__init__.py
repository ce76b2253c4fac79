"""Measurements and checks. Each prints a table and writes JSON that says where it comes from.

Through the real services:
parity.py       our lists against Hugging Face `generate`       histories.py    whose lists: real users or random ones
lossless.py     strict against target-only, with exclusions     services.py     a bundle's services, asked about many users

In this process, many configurations at once:
acceptance.py           target passes by draft, mode, K and plan        cases.py         users of a data set, and their answers
acceptance_search.py    one user's searches                             warm_models.py   models that keep a user's tree
acceptance_report.py    a page and plots from the JSON           pages.py         what such pages share
"""
