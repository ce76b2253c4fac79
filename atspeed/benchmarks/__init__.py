"""Measurements and checks. Each prints a table and writes JSON that says where it comes from.

Through the real services:
parity.py       our lists against Hugging Face `generate`       histories.py    whose lists: real users or random ones
lossless.py     strict against target-only, with exclusions     services.py     a bundle's services, asked about many users
load.py         open-loop load at rising rates                  arrivals.py     who asks when
pass_metrics.py requests that shared passes
load_report.py  a page and plots from the JSON                  bare_runner.py  the bound: the model alone, in a closed loop
decode.py       time of a list by mode, K and prefix            decode_peers.py Hugging Face generate, onnxruntime-genai
decode_report.py  a page and plots from the JSON                overhead.py     what the services add to the models' time

In this process, many configurations at once:
acceptance.py           target passes by draft, mode, K and plan        cases.py         users of a data set, and their answers
acceptance_search.py    one user's searches                             warm_models.py   models that keep a user's tree
acceptance_report.py    a page and plots from the JSON

Without users:
scaling.py              what grows with catalogue, K and prompt         synthetic.py        catalogues of any size
scaling_report.py       a page and a plot from the JSON                 catalogue_probe.py  one of them, in its own process

On a GPU: gpu.py, with model_probe.py for passes by themselves.

Of all pages: pages.py. Of all results: results.py, provenance.py, intervals.py.
"""
