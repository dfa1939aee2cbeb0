"""``trtkit serve``: an engine behind the OpenAI HTTP interface, many clients in one in-flight batch.

One thread owns the engine (``engine_thread.py``). Requests are read (``bodies.py``, ``service.py``), generated
(``generation.py``) or voted on (``voting.py``), and written (``replies.py``). Only ``app.py`` and ``server.py`` know
HTTP.
"""
