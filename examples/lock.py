"""Keep a conversation to yourself while you work on it outside KSI: nobody's turn runs in between.

Without asyncio, for scripts. Needs a running daemon: `ksi start`. Run it with `.venv/bin/python examples/lock.py`.
"""

import ksi

with ksi.BlockingClient() as client:
    with client.lock("notebook", metadata={"why": "tidying up"}) as lock:
        status = client.send_event("conversation:lock_status", {"conversation_id": "notebook"})
        print(f"held by {status['holder']} with fence {lock.fence}")
        # Asked meanwhile: it waits in the conversation's line until the lock is given back.
        handle = client.submit("What did we say?", session_id="notebook")
        print(f"the request is {handle.submitted['status']}, {handle.submitted['position']} before it")
    print(handle.result(timeout=120).result)
