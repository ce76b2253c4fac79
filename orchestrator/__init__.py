"""The orchestrator: the path of a request.

In the order of the call: server, requests, recommend (history, planner), beam_loop (memo, policy), clients, replies.
"""
