"""The ``Engine`` protocol on a running server that speaks OpenAI's completions interface.

server.py    which model a server has, and what kind of server it is
dialects.py  what servers want to be told, and how they put what they say; pure
client.py    the requests under way, on a thread of their own
engine.py    the engine: rows, stops, lost connections
"""
