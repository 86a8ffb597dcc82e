"""Three agents in Claude Code work on one question: two experts at the same time, then an editor over both.

Each agent is a conversation with a name, so each remembers: ask another question, and they go on from this one. Needs
a daemon on this folder's configuration; docs/how-to/claude-code.md says how. Run it with
`.venv/bin/python examples/claude_agents/agents.py "How should we store our users' photos?"`.
"""

import asyncio
import sys

import ksi

QUESTION = "How should a small team store its users' photos?"
EXPERTS = {
    "engineer": "You are an engineer. Answer in at most five sentences, and say what breaks first.",
    "accountant": "You are an accountant. Answer in at most five sentences, and say what it will cost.",
}
EDITOR = "You are an editor. You decide between experts, in at most five sentences, and give your reason."


async def ask_experts(client: ksi.Client, question: str) -> dict[str, str]:
    """All experts at once; each in its own conversation, whose turns can never run side by side."""
    handles = {
        name: await client.submit(question, system=system, session_id=f"team-{name}", agent_id=name)
        for name, system in EXPERTS.items()
    }
    return {name: (await handle.result(timeout=600)).result or "" for name, handle in handles.items()}


async def edit(client: ksi.Client, question: str, answers: dict[str, str]) -> None:
    """The editor reads what they said; the text is printed as it comes."""
    said = "\n\n".join(f"The {name} says:\n{answer}" for name, answer in answers.items())
    handle = await client.submit(
        f"{said}\n\nThe question was: {question}",
        system=EDITOR,
        session_id="team-editor",
        agent_id="editor",
        priority="high",
        stream=True,
    )
    print("editor: ", end="")
    async for text in handle.stream():
        print(text, end="", flush=True)
    print("\n")


async def report(client: ksi.Client) -> None:
    """What it took, and where the conversations are kept by Claude Code."""
    usage = await client.send_event("completion:token_usage", {"group_by": "agent", "hours": 1})
    for row in usage["by_agent"]:
        print(f"{row['agent_id']}: {row['input_tokens']:,} tokens in, {row['output_tokens']:,} out")
    sessions = await client.send_event("completion:session_status", {})
    for session in sessions["sessions"]:
        print(f"{session['session_id']} is Claude Code's session {session.get('provider_session_id')}")


async def main(question: str) -> None:
    """One question through the team."""
    async with ksi.Client() as client:
        answers = await ask_experts(client, question)
        for name, answer in answers.items():
            print(f"{name}: {answer}\n")
        await edit(client, question, answers)
        again = await client.complete(
            "The editor has decided. In one sentence: what would you watch now?",
            system=EXPERTS["engineer"],
            session_id="team-engineer",
            agent_id="engineer",
        )
        print(f"engineer, asked again: {again.result}\n")
        await report(client)


if __name__ == "__main__":
    try:
        asyncio.run(main(" ".join(sys.argv[1:]) or QUESTION))
    except ksi.KsiError as error:
        sys.exit(f"agents.py: {error.message}")
