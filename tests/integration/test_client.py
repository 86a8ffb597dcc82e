"""The clients against a real daemon: answers, streams, losses, locks, and the examples."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import ksi
from tests.daemon_process import DaemonProcess, clean_environ, make_home

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = [*sorted(FOLDER.glob("*.py")), FOLDER / "research_chain" / "research.py"]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(make_home(tmp_path_factory.mktemp("home"))) as process:
        yield process


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """One that may be killed."""
    with DaemonProcess(make_home(tmp_path)) as process:
        yield process


@pytest.fixture
async def client(daemon: DaemonProcess) -> AsyncIterator[ksi.Client]:
    async with asyncio.timeout(30), ksi.Client(daemon.socket_path) as client:
        yield client


@pytest.fixture
def blocking(daemon: DaemonProcess) -> Iterator[ksi.BlockingClient]:
    with ksi.BlockingClient(home=daemon.home) as client:
        yield client


async def running(client: ksi.Client, request_id: str) -> None:
    """Wait until a request runs, from any client."""
    while True:
        with contextlib.suppress(ksi.RemoteError):  # not there yet
            if (await client.get(request_id)).status == "running":
                return


# Answers


async def test_a_completion_is_answered(client: ksi.Client) -> None:
    reply = await client.complete("Hello", agent_id="tester", metadata={"n": 1})
    assert reply.result == "echo: Hello"
    assert reply.provider == "stub"
    assert reply.usage is not None
    assert reply.usage.input_tokens == 1
    assert (await client.get(reply.request_id)).result == "echo: Hello"


async def test_many_requests_at_once_get_their_own_answers(client: ksi.Client) -> None:
    handles = await asyncio.gather(*(client.submit(str(number)) for number in range(200)))
    replies = await asyncio.gather(*(handle.result() for handle in handles))
    assert [reply.result for reply in replies] == [f"echo: {number}" for number in range(200)]


@pytest.mark.promise("S1")
async def test_a_prompt_of_ten_megabytes_goes_there_and_its_echo_back(client: ksi.Client) -> None:
    prompt = "ä" * 5_000_000
    assert (await client.complete(prompt)).result == f"echo: {prompt}"


async def test_a_refused_request_raises_the_daemon_s_error(client: ksi.Client) -> None:
    with pytest.raises(ksi.RemoteError, match="no provider serves") as caught:
        await client.complete("Hello", model="nobody/x")
    assert caught.value.code == "unknown_model"


async def test_a_failed_request_raises_its_class(client: ksi.Client) -> None:
    handle = await client.submit("Hello", model="broken/x")
    with pytest.raises(ksi.RemoteError) as caught:
        await handle.result()
    assert caught.value.code == "invalid_request"
    assert caught.value.details["status"] == "failed"


@pytest.mark.promise("F8")
async def test_a_running_request_is_cancelled_by_its_handle(client: ksi.Client) -> None:
    handle = await client.submit("Hello", model="slow/x")
    assert (await handle.cancel()).status == "cancelled"
    with pytest.raises(ksi.RemoteError) as caught:
        await handle.result()
    assert caught.value.code == "cancelled"
    assert (await handle.cancel()).status == "already_final"


@pytest.mark.promise("R2")
async def test_an_answer_is_streamed_in_pieces(client: ksi.Client) -> None:
    handle = await client.submit("Name three colours", model="drip/x", stream=True)
    chunks = [chunk async for chunk in handle.chunks()]
    assert [chunk.seq for chunk in chunks] == [0, 1, 2, 3]
    assert "".join(chunk.text for chunk in chunks) == "echo: Name three colours"


@pytest.mark.promise("R1", "R2")
async def test_another_client_can_attach_to_a_request_and_read_all_of_its_text(
    client: ksi.Client, daemon: DaemonProcess
) -> None:
    handle = await client.submit("Name three colours", model="drip/x", stream=True)
    first = await anext(handle.stream())
    async with ksi.Client(daemon.socket_path) as other:
        text = "".join([piece async for piece in other.attach(handle.request_id, stream=True).stream()])
    assert first
    assert text.startswith(first)
    assert text == "echo: Name three colours"


async def test_an_unknown_request_cannot_be_attached_to(client: ksi.Client) -> None:
    with pytest.raises(ksi.RemoteError) as caught:
        await client.attach("never seen").result()
    assert caught.value.code == "not_found"


async def test_a_subscriber_hears_of_another_client_s_request(client: ksi.Client, daemon: DaemonProcess) -> None:
    async with client.subscribe("completion:result") as events, ksi.Client(daemon.socket_path) as other:
        reply = await other.complete("Hello")
        async with asyncio.timeout(30):
            async for event in events:
                if event.data["request_id"] == reply.request_id:
                    break
        assert (event.data["request_id"], event.data["result"]) == (reply.request_id, "echo: Hello")


# Locks


@pytest.mark.promise("L5")
async def test_a_request_waits_while_its_conversation_is_locked(client: ksi.Client) -> None:
    async with client.lock("locked-1") as lock:
        handle = await client.submit("Hello", session_id="locked-1")
        assert handle.submitted["status"] == "queued"
        assert handle.submitted["holder"] == lock.request_id
    assert (await handle.result()).result == "echo: Hello"


@pytest.mark.promise("L5")
async def test_locks_of_one_conversation_are_held_one_after_the_other(client: ksi.Client) -> None:
    fences: list[int] = []
    inside = 0

    async def work(who: int) -> None:
        nonlocal inside
        async with client.lock("locked-2", priority="high" if who % 2 else None) as lock:
            inside += 1
            assert inside == 1
            await client.send_event("conversation:renew_lock", {"request_id": lock.request_id, "fence": lock.fence})
            assert lock.fence is not None
            fences.append(lock.fence)
            inside -= 1

    async with asyncio.TaskGroup() as group:
        for who in range(10):
            group.create_task(work(who))
    assert fences == sorted(set(fences))


async def test_who_gives_up_waiting_for_a_lock_is_out_of_the_line(client: ksi.Client) -> None:
    async with client.lock("locked-3"):
        with pytest.raises(ksi.WaitTimeout):
            async with client.lock("locked-3", timeout=0.05):
                pytest.fail("two holders")
        status = await client.send_event("conversation:lock_status", {"conversation_id": "locked-3"})
        assert status["queue"] == []


# Lost daemons


@pytest.mark.promise("Q3", "Q4", "R1")
async def test_a_completion_outlives_the_daemon_s_death(own_daemon: DaemonProcess) -> None:
    async with asyncio.timeout(30), ksi.Client(own_daemon.socket_path) as client:
        asking = asyncio.ensure_future(
            client.complete("Hello", request_id="r1", model="stub/x", provider_options={"delay": 0.3})
        )
        await running(client, "r1")
        own_daemon.end(signal.SIGKILL)
        own_daemon.start()
        reply = await asking
    assert reply.result == "echo: Hello"
    assert [attempt.outcome for attempt in reply.attempts] == ["interrupted", "completed"]


@pytest.mark.promise("R1", "R2")
async def test_a_handle_and_its_stream_outlive_a_restart(own_daemon: DaemonProcess) -> None:
    async with asyncio.timeout(30), ksi.Client(own_daemon.socket_path) as client:
        options = {"pieces": 3, "piece_delay": 0.5}
        handle = await client.submit("Name it", stream=True, provider_options=options)
        chunks = handle.chunks()
        first = await anext(chunks)
        own_daemon.end(signal.SIGKILL)
        own_daemon.start()
        text = first.text
        async for chunk in chunks:
            text = chunk.text if chunk.restarted else text + chunk.text
        reply = await handle.result()
    assert (first.attempt, first.seq) == (1, 0)
    assert text == reply.result == "echo: Name it"
    assert len(reply.attempts) == 2


async def test_a_subscription_goes_on_after_a_restart(own_daemon: DaemonProcess) -> None:
    async with (
        asyncio.timeout(30),
        ksi.Client(own_daemon.socket_path) as client,
        client.subscribe("completion:result") as events,
    ):
        own_daemon.end(signal.SIGTERM)
        own_daemon.start()
        await client.complete("Hello")
        assert (await anext(events)).data["result"] == "echo: Hello"
        assert events.gaps == 1


@pytest.mark.promise("L5")
async def test_a_lock_that_is_waited_for_and_one_that_is_held_outlive_a_restart(own_daemon: DaemonProcess) -> None:
    async with asyncio.timeout(30), ksi.Client(own_daemon.socket_path) as client:
        async with client.lock("c") as held:
            waiting = client.lock("c")
            entering = asyncio.ensure_future(waiting.__aenter__())
            status: dict[str, object] = {}
            while status.get("waiting") != 1:
                status = await client.send_event("conversation:lock_status", {"conversation_id": "c"})
            own_daemon.end(signal.SIGKILL)
            own_daemon.start()
            status = await client.send_event("conversation:lock_status", {"conversation_id": "c"})
            assert status["holder"] == held.request_id
            assert not entering.done()
        await entering
        assert waiting.fence is not None
        assert held.fence is not None
        assert waiting.fence > held.fence
        await waiting.__aexit__(None, None, None)


# The blocking client


def test_a_script_asks_and_is_answered(blocking: ksi.BlockingClient) -> None:
    assert blocking.complete("Hello").result == "echo: Hello"
    assert blocking.send_event("completion:status")["status"] == "ok"
    with pytest.raises(ksi.RemoteError):
        blocking.get("never seen")


def test_a_script_streams_waits_and_cancels(blocking: ksi.BlockingClient) -> None:
    handle = blocking.submit("Name it", model="drip/x", stream=True)
    assert "".join(handle.stream()) == "echo: Name it"
    assert handle.result().result == "echo: Name it"
    assert "".join(chunk.text for chunk in handle.chunks()) == "echo: Name it"
    slow = blocking.submit("Hello", model="slow/x")
    with pytest.raises(ksi.WaitTimeout):
        slow.result(timeout=0.01)
    assert slow.cancel().status == "cancelled"
    assert slow.wait().status == "cancelled"
    assert slow.done
    assert blocking.attach(handle.request_id).result().request_id == handle.request_id


def test_a_script_subscribes(blocking: ksi.BlockingClient) -> None:
    with blocking.subscribe("completion:result") as events:
        handle = blocking.submit("Hello")
        mine = next(event for event in events if event.data["request_id"] == handle.request_id)
        assert mine.data["result"] == "echo: Hello"


def test_a_script_holds_a_lock(blocking: ksi.BlockingClient) -> None:
    with blocking.lock("script"):
        handle = blocking.submit("Hello", session_id="script")
        assert handle.submitted["status"] == "queued"
    assert handle.session_id == "script"
    assert handle.result().result == "echo: Hello"
    with pytest.raises(ZeroDivisionError), blocking.lock("script"):
        raise ZeroDivisionError
    with blocking.lock("script", wait=False):
        pass


def test_threads_share_a_blocking_client(blocking: ksi.BlockingClient) -> None:
    answers: dict[int, str | None] = {}

    def ask(number: int) -> None:
        answers[number] = blocking.complete(str(number)).result

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers == {number: f"echo: {number}" for number in range(8)}


def test_a_blocking_client_is_opened_and_closed_as_often_as_one_likes(daemon: DaemonProcess, tmp_path: Path) -> None:
    client = ksi.BlockingClient(daemon.socket_path)
    with pytest.raises(ksi.ConnectionFailed, match="not open"):
        client.complete("Hello")
    for _ in range(2):
        client.open()
        client.open()
        assert client.complete("Hello").result == "echo: Hello"
        client.close()
        client.close()
    nobody = ksi.BlockingClient(tmp_path / "daemon.sock")
    with pytest.raises(ksi.ConnectionFailed, match="ksi start"):
        nobody.open()
    assert not [thread for thread in threading.enumerate() if thread.name == "ksi-client"]


# Costs, and the examples


def test_importing_the_client_loads_nothing_heavy() -> None:
    code = "import sys, ksi; ksi.Client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30).stdout
    heavy = {"rich", "click", "aiohttp", "uvloop", "apsw", "structlog", "ksi.daemon", "ksi.config"}
    assert heavy.isdisjoint(loaded.split())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_runs(daemon: DaemonProcess, example: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example)],
        env={**clean_environ(), "KSI_HOME": str(daemon.home)},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=os.sep,
    )
    assert done.returncode == 0, done.stderr
    assert "echo: " in done.stdout or "completion:result" in done.stdout
