"""The orchestrator: the path of a request.

In the order of the call: server, requests, recommend (history), model_clients, planning, search, replies. Each of the three rooms
knows those after it at most; that is held by an import contract.
"""
