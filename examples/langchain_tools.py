"""LangChain's ChatOpenAI with tools, against `flashrt serve`: an agent looks for hidden things.

The server holds every call to the schemas of the tools, so all of them can be carried out, even
those of the small model that comes along, which knows no JSON: it seldom looks in the right place.
Each turn sends the whole conversation again, as agents do; the server feeds its model what is new.

    pip install 'flashrt[serve]' langchain-openai
    python examples/langchain_tools.py [URL]     # of a server; without one, it starts its own
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Literal

from flashrt.worlds.building import TAKEN, Building, call_text
from flashrt.worlds.document import HELD_OUT, Thing

try:
    from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage
    from langchain_core.tools import BaseTool, tool
    from langchain_openai import ChatOpenAI
except ImportError:
    sys.exit("this example needs LangChain's client: pip install langchain-openai")

HINTS, REQUESTS, CALLS = 4, 3, 6


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The address of a server, of this program's own unless one is given."""
    if len(sys.argv) > 1:
        yield sys.argv[1]
        return
    command = [sys.executable, "-m", "flashrt", "serve", "--port", "0", "--lanes", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "listening on " in line:
                yield line.split()[-1]
                break
        else:
            sys.exit("".join(said))
        process.terminate()


def tools_of(building: Building) -> dict[str, BaseTool]:
    """The building's two tools; what a call may name is in their schemas."""
    places = Literal[tuple(sorted({place for pair in building.hints.values() for place in pair}))]
    things = Literal[tuple(str(thing) for thing in building.things)]

    @tool
    def look(place: places) -> str:  # type: ignore[valid-type]
        """Look into a place."""
        return building.call(call_text("look", place))

    @tool
    def take(thing: things) -> str:  # type: ignore[valid-type]
        """Take a thing that you see."""
        return building.call(call_text("take", *thing.split()))

    return {"look": look, "take": take}


def fetch(model: ChatOpenAI, building: Building, thing: Thing, messages: list[AnyMessage]) -> None:
    """Call, result, call, ... until the thing is taken, or was looked for often enough."""
    tools = tools_of(building)
    calling = model.bind_tools(list(tools.values()), tool_choice="any", parallel_tool_calls=False)
    messages.append(HumanMessage(building.request(thing)))
    for _ in range(CALLS):
        reply = calling.invoke(messages)
        messages.append(reply)
        for call in reply.tool_calls:
            result = tools[call["name"]].invoke(call)  # it checks the arguments
            messages.append(result)
            print(f"{call['name']} {' '.join(call['args'].values())}: {result.content}")
            if result.content == TAKEN:
                return


def main() -> None:
    """Some requests in one conversation."""
    building = Building(HELD_OUT, HINTS)
    messages: list[AnyMessage] = [SystemMessage(building.prompt())]
    with server() as url:
        model = ChatOpenAI(
            base_url=f"{url}/v1", api_key="none", model="default", temperature=0, max_tokens=200
        )
        for thing in building.things[:REQUESTS]:
            fetch(model, building, thing, messages)
    replies = [message for message in messages if message.type == "ai"]
    usage = [reply.usage_metadata for reply in replies]
    sent = sum(one["input_tokens"] for one in usage)
    fed = sent - sum(one["input_token_details"]["cache_read"] for one in usage)
    brought = sum(building.is_brought(thing) for thing in building.things)
    assert all(reply.tool_calls for reply in replies), "every reply is a call"
    print(f"{len(replies)} calls, all as the schemas want them; brought {brought} of {REQUESTS}")
    print(f"{sent:,} tokens of prompts, of which {fed:,} were fed; "
          f"the first prompt has {usage[0]['input_tokens']:,}")  # fmt: skip


if __name__ == "__main__":
    main()
