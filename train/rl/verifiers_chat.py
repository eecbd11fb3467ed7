"""A harness for `verifiers`: a chat with a task's tools, in this process. Only imported where that is installed."""

import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import verifiers.v1 as vf
from openai import APIStatusError, AsyncOpenAI
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

from drivetrain.data.conversations import Message
from drivetrain.train.rl.verifiers_environment import plain

__all__ = ["Chat"]  # by which the library finds it


class Chat(vf.Harness[vf.HarnessConfig]):
    """Asks the model, calls the tools that it names, and asks again, until a turn has no call."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: Any,
    ) -> Any:
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(
                AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0, timeout=None)
            )
            tools, dispatch, connections = await connect_mcp({"mcpServers": servers}, stack)
            shown: dict[str, Any] = {"tools": tools} if tools else {}
            messages: list[Any] = first_messages(data)
            while True:
                try:
                    answer = await client.chat.completions.create(model=ctx.model, messages=messages, **shown)
                except APIStatusError as error:
                    if error.status_code == 400:
                        break  # no room is left, or a limit of the task ends it: what is there is scored
                    raise
                message = answer.choices[0].message.model_dump(exclude_none=True)
                messages.append(message)
                calls = message.get("tool_calls") or []
                for call in calls:
                    content = await _result(call["function"], connections, dispatch)
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
                if not calls:
                    break
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


async def _result(function: Mapping[str, Any], connections: Any, dispatch: Any) -> Any:
    """What a call gives, or what is wrong with it."""
    name = function["name"]
    if name not in dispatch:
        return f"error: there is no tool {name!r}; there is {', '.join(dispatch)}"
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return f"error: {function['arguments']}"
    return await call_mcp(connections, dispatch, name, arguments)


def first_messages(data: Any) -> list[Message]:
    """What a task begins with: its system prompt and its prompt."""
    system = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
    if isinstance(data.prompt, str):
        return [*system, {"role": "user", "content": data.prompt}]
    return [*system, *(plain(message_to_wire(message)) for message in data.prompt or [])]
