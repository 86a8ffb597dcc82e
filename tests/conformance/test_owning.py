"""Conversations that get another name, are searched, and are deleted for good."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ksi.errors import ConversationBusy, HasForks, InvalidData, NameTaken, NotFound, Unsupported
from ksi.request import Usage
from ksi.store.redis.store import RedisStore
from ksi.store.rules.terms import phrases
from ksi.store.usage import UsageBy, UsageQuery
from ksi.store.values import Listing
from tests.conformance.chain_parts import after, begin, complete, direct, member, reminder
from tests.conformance.world import World

pytestmark = pytest.mark.promise("V4")


async def turn(world: World, request_id: str, conversation: str = "talk", **fields: object) -> None:
    """A request that completed."""
    await world.complete(await world.run(request_id, conversation, **fields))


async def texts(world: World, conversation: str = "talk") -> list[str]:
    """The answers of a conversation, the newest first."""
    session = await world.store.session(conversation)
    assert session is not None
    return [] if session.head is None else [one.text for one in await world.store.history(session.head, 10_000)]


def usage_of(**fields: Any) -> UsageQuery:
    """The whole usage."""
    return UsageQuery(since=0, until=2**62, **fields)


# -- renaming -----------------------------------------------------------------------------------------------------


async def test_a_renamed_conversation_goes_on_under_both_names(world: World) -> None:
    await turn(world, "a")
    assert await world.store.rename("talk", "trip", world.clock.now()) == "talk"
    for name in ("trip", "talk"):
        session = await world.store.session(name)
        assert session is not None
        assert (session.conversation, session.turns) == ("trip", 1)
    await turn(world, "b", "talk")
    assert await texts(world, "trip") == ["answer to b", "answer to a"]
    assert (await world.view("b")).conversation == "trip"
    assert await world.store.find("conversation", "t", 10) == ("trip",)
    await world.crash()
    assert await texts(world, "talk") == ["answer to b", "answer to a"]


async def test_a_conversation_may_take_an_earlier_name_back(world: World) -> None:
    await turn(world, "a")
    for name in ("trip", "talk", "talk"):
        await world.store.rename("talk", name, world.clock.now())
        session = await world.store.session("trip")
        assert session is not None
        assert session.conversation == name


async def test_a_name_of_another_conversation_is_refused(world: World) -> None:
    await turn(world, "a", "talk")
    await turn(world, "b", "other")
    with pytest.raises(NameTaken):
        await world.store.rename("talk", "other", world.clock.now())
    await world.store.rename("other", "newer", world.clock.now())
    with pytest.raises(NameTaken):
        await world.store.rename("talk", "other", world.clock.now())
    with pytest.raises(NotFound):
        await world.store.rename("nobody", "somebody", world.clock.now())


async def test_forks_and_the_account_know_the_new_name(world: World) -> None:
    await turn(world, "a")
    await turn(world, "b", "child", fork_of="talk")
    await world.store.rename("talk", "trip", world.clock.now())
    await world.store.rename("child", "branch", world.clock.now())
    (fork,) = (await world.store.forks(10, None, "branch")).items
    assert (fork.parent, fork.child) == ("trip", "branch")
    report = await world.store.usage(usage_of(groups=(UsageBy.SESSION,)), lambda *_: ())
    assert {row.key for row in report.groups[UsageBy.SESSION].rows} == {"trip", "branch"}
    only = await world.store.usage(usage_of(conversation="talk"), lambda *_: ())
    assert only.total.attempts == 1


async def test_a_conversation_is_renamed_while_it_is_in_use(world: World) -> None:
    running = await world.run("a")
    await world.enqueue("b")
    await world.store.rename("talk", "trip", world.clock.now())
    await world.complete(running)
    second = await world.claim_one()
    assert (second.request_id, second.conversation) == ("b", "trip")
    assert (await world.view("b")).conversation == "trip"
    await world.complete(second)
    for name in ("talk", "trip"):
        enqueued = await world.enqueue(f"by {name}", name)
        assert enqueued.conversation == "trip"
        await world.complete(await world.claim_one())


async def test_a_run_of_before_its_renaming_leaves_the_new_name(world: World) -> None:
    running = await world.run("a")
    await world.store.rename("talk", "trip", world.clock.now())
    await world.complete(running)
    assert (await world.run("b", "talk")).conversation == "trip"


# -- deleting -----------------------------------------------------------------------------------------------------


async def test_nothing_of_a_deleted_conversation_can_be_asked_for(world: World) -> None:
    await turn(world, "a", agent_id="ann")
    await world.fail(await world.run("broken"))
    await turn(world, "kept", "other")
    deleted = await world.store.delete("talk", world.clock.now())
    assert (deleted.conversation, deleted.requests, deleted.turns) == ("talk", 2, 1)
    world.pruned = True
    assert await world.store.session("talk") is None
    assert await world.store.get("a") is None
    assert await world.store.get("broken") is None
    assert await world.listed(Listing.FINISHED) == ["kept"]
    assert await world.listed(Listing.FAILED) == []
    assert [one.request_id for one in await world.store.log_after(0, 10)] == ["kept"]
    assert await texts(world, "other") == ["answer to kept"]
    with pytest.raises(NotFound):
        await world.store.delete("talk", world.clock.now())
    await world.crash()
    assert await world.store.session("talk") is None
    assert (await world.store.sessions(10)).items[0].conversation == "other"


async def test_a_deleted_name_starts_from_nothing(world: World) -> None:
    await turn(world, "a")
    await world.store.rename("talk", "trip", world.clock.now())
    deleted = await world.store.delete("talk", world.clock.now())
    assert deleted.aliases == ("talk",)
    world.pruned = True
    await turn(world, "a", "talk")
    assert await texts(world) == ["answer to a"]
    assert await world.store.session("trip") is None


async def test_turns_whose_requests_are_past_their_time_are_deleted_too(world: World) -> None:
    for number in range(30):
        await turn(world, f"old {number}")
    turns = await world.store.log_after(0, 100)
    await world.store.set_log_watermark(turns[-1].id)
    world.clock.forward(8 * 24 * 3_600)
    assert await world.prune() == (30, 0)
    await turn(world, "new")
    deleted = await world.store.delete("talk", world.clock.now())
    assert (deleted.turns, deleted.requests) == (31, 1)
    assert await world.store.session("talk") is None
    await turn(world, "again")
    assert await texts(world) == ["answer to again"]


async def test_the_cost_of_a_deleted_conversation_stays_in_the_account(world: World) -> None:
    claim = await world.run("a", agent_id="ann")
    await world.complete(claim, usage=Usage(input_tokens=7, output_tokens=3))
    await world.fail(await world.run("broken", agent_id="ann"))
    await world.store.delete("talk", world.clock.now())
    world.pruned = True
    query = usage_of(groups=(UsageBy.SESSION, UsageBy.AGENT))
    report = await world.store.usage(query, lambda *_: ())
    assert (report.total.attempts, report.total.requests, report.total.input_tokens) == (2, 2, 7)
    assert [row.key for row in report.groups[UsageBy.AGENT].rows] == ["ann"]
    assert [row.key for row in report.groups[UsageBy.SESSION].rows] == [None]
    again = await world.run("b", "talk")
    await world.complete(again, usage=Usage(input_tokens=1, output_tokens=1))
    assert (await world.store.usage(usage_of(conversation="talk"), lambda *_: ())).total.input_tokens == 1


async def test_the_account_of_a_deleted_conversation_is_pruned_with_its_time(world: World) -> None:
    await turn(world, "a")
    await world.store.delete("talk", world.clock.now())
    world.pruned = True
    world.clock.forward(91 * 24 * 3_600)
    await world.prune()
    assert (await world.store.usage(usage_of(), lambda *_: ())).total.attempts == 0


@pytest.mark.parametrize("how", ["running", "queued", "scheduled", "retrying", "locked"])
async def test_a_conversation_in_use_is_not_deleted(world: World, how: str) -> None:
    await turn(world, "a")
    match how:
        case "running":
            await world.run("b")
        case "queued":
            await world.enqueue("b")
        case "scheduled":
            await world.enqueue("b", due=world.clock.wall + 1_000_000)
        case "retrying":
            await world.retry(await world.run("b"))
        case "locked":
            await world.acquire("b")
    with pytest.raises(ConversationBusy) as refused:
        await world.store.delete("talk", world.clock.now())
    assert refused.value.details["holder"] == "b"
    assert await texts(world) == ["answer to a"]


async def test_a_conversation_whose_turns_are_in_forks_is_not_deleted(world: World) -> None:
    await turn(world, "a")
    await turn(world, "b", "child", fork_of="talk")
    with pytest.raises(HasForks) as refused:
        await world.store.delete("talk", world.clock.now())
    assert refused.value.details["forks"] == ["child"]
    await world.store.delete("child", world.clock.now())
    world.pruned = True
    assert await texts(world) == ["answer to a"]
    await world.store.delete("talk", world.clock.now())
    assert (await world.store.sessions(10)).items == ()
    assert (await world.store.forks(10)).items == ()


async def test_a_chain_goes_on_without_its_deleted_members(world: World) -> None:
    root = await begin(world)
    await complete(world, root)
    child = await world.run("child", "other", chain=member("root", mark=b"what it was about"))
    await complete(world, child)
    await world.store.delete("other", world.clock.now())
    world.pruned = True
    assert [row.request_id for row in (await world.store.members("root", 10)).items] == ["root"]
    await world.store.delete("talk", world.clock.now())
    assert await world.store.chain("root") is None
    assert (await world.store.chains(10)).items == ()


async def test_deliveries_of_a_deleted_conversation_go_and_those_under_way_arrive(world: World) -> None:
    root = await begin(world)
    await complete(world, root, after(direct("on its way", "target"), reminder("waiting", "later")))
    deleted = await world.store.delete("talk", world.clock.now())
    world.pruned = True
    assert deleted.deliveries == 0
    assert {one.injection_id for one in (await world.store.injections(10)).items} == {"on its way", "waiting"}
    await world.complete(await world.claim_one())
    assert (await world.view("on its way")).injection == "on its way"
    await world.run("reminded", "later")


async def test_ended_deliveries_are_deleted_on_both_sides(world: World) -> None:
    root = await begin(world)
    await complete(world, root, after(direct("sent", "target")))
    await world.complete(await world.claim_one())
    deleted = await world.store.delete("talk", world.clock.now())
    world.pruned = True
    assert (deleted.deliveries, deleted.reached) == (1, ("target",))
    assert (await world.store.injections(10)).items == ()
    assert (await world.view("sent")).injection == "sent"


async def test_reminders_that_wait_for_a_deleted_conversation_go_with_it(world: World) -> None:
    await turn(world, "here", "later")
    root = await begin(world)
    await complete(world, root, after(reminder("waiting", "later")))
    deleted = await world.store.delete("later", world.clock.now())
    world.pruned = True
    assert (deleted.deliveries, deleted.reached) == (1, ())
    assert (await world.store.injections(10)).items == ()


async def test_a_result_that_is_still_to_be_routed_keeps_its_conversation(world: World) -> None:
    await turn(world, "before")
    await world.enqueue("a", chain=member(injects=True))
    await world.cancel("a")
    with pytest.raises(ConversationBusy) as refused:
        await world.store.delete("talk", world.clock.now())
    assert refused.value.details["holder"] == "a"


# -- searching ----------------------------------------------------------------------------------------------------


async def found(world: World, query: str, limit: int = 10, cursor: str | None = None) -> list[str]:
    """The results of a search, by their answers."""
    page = await world.store.search(phrases(query), limit, cursor)
    return [one.text for one in page.items]


async def say(world: World, request_id: str, prompt: str, text: str, conversation: str = "talk") -> None:
    """A turn with these words."""
    claim = await world.run(request_id, conversation, body=b'{"prompt":"%s"}' % prompt.encode())
    await world.complete(claim, text=text)


async def test_turns_are_found_by_words_phrases_and_beginnings(world: World) -> None:
    if isinstance(world.store, RedisStore):
        with pytest.raises(Unsupported, match="Redis"):
            await world.store.search(phrases("anything"), 10)
        return
    await say(world, "a", "How far is it to Orl\u00e9ans?", "About 130 km by the A10")
    await say(world, "b", "Is there a train?", "Yes, trains go hourly", "other")
    assert await found(world, "orleans") == ["About 130 km by the A10"]
    assert await found(world, "ORLE\u0301ANS far") == ["About 130 km by the A10"]
    assert await found(world, '"far is it"') == ["About 130 km by the A10"]
    assert await found(world, '"it far"') == []
    assert await found(world, "train") == ["Yes, trains go hourly"]
    assert await found(world, "hour*") == ["Yes, trains go hourly"]
    assert await found(world, "hour") == []
    assert await found(world, "is") == ["Yes, trains go hourly", "About 130 km by the A10"]
    with pytest.raises(InvalidData):
        await found(world, " -- * ")


async def test_a_search_is_answered_page_by_page_and_sees_added_turns(world: World) -> None:
    if isinstance(world.store, RedisStore):
        return
    for number in range(5):
        await say(world, str(number), "count", f"number {number}")
    page = await world.store.search(phrases("count"), 2)
    assert [one.text for one in page.items] == ["number 4", "number 3"]
    page = await world.store.search(phrases("count"), 10, page.cursor)
    assert ([one.text for one in page.items], page.cursor) == (["number 2", "number 1", "number 0"], None)
    await say(world, "5", "count", "number 5")
    assert await found(world, "count number", 1) == ["number 5"]
    with pytest.raises(InvalidData):
        await world.store.search(phrases("count"), 10, "nonsense")


async def test_a_deleted_conversation_is_not_found_and_a_new_name_is_shown(world: World) -> None:
    if isinstance(world.store, RedisStore):
        return
    await say(world, "a", "a secret", "kept to myself")
    await say(world, "b", "no secret", "said to all", "other")
    assert len(await found(world, "secret")) == 2
    await world.store.rename("other", "newer", world.clock.now())
    await world.store.delete("talk", world.clock.now())
    world.pruned = True
    (one,) = (await world.store.search(phrases("secret"), 10)).items
    assert (one.conversation, one.text) == ("newer", "said to all")


async def test_words_of_languages_without_spaces_are_found_inside_a_line(world: World) -> None:
    if isinstance(world.store, RedisStore):
        return
    await say(world, "a", "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0", "ok")
    assert await found(world, "\u672c\u8a9e") == ["ok"]
    assert await found(world, "\u8a9e\u672c") == []
    await say(world, "b", "\u6b652 \u91cd\u8dd1gen-itgc\u540e50\u6761\u60ac\u7a7a\u5f15\u7528", "mixed")
    for query in ("itgc", "gen", "\u60ac\u7a7a", "\u60ac\u7a7a\u5f15\u7528 gen", "50"):
        assert await found(world, query) == ["mixed"]
    await say(world, "c", "\ud55c\uad6d\uc5b4 \uac80\uc0c9\uc785\ub2c8\ub2e4", "korean")
    assert await found(world, "\uac80\uc0c9") == ["korean"]
    await say(world, "d", "\u304b\u3099\u3063\u3053\u3046", "kana, in parts")
    assert await found(world, "\u304c\u3063\u3053\u3046") == ["kana, in parts"]


async def test_two_searches_at_once_agree(world: World) -> None:
    if isinstance(world.store, RedisStore):
        return
    for number in range(20):
        await say(world, str(number), "count", f"number {number}")
    results = await asyncio.gather(*(found(world, "count", 50) for _ in range(4)))
    assert [len(result) for result in results] == [20] * 4
