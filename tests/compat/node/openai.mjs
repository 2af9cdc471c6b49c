import OpenAI from "openai";
import { asked, callsTool, read, tool, untilTold, waits } from "./shared.mjs";

const tools = [{ type: "function", function: tool }];
const responsesTools = [{ type: "function", strict: false, ...tool }];
const client = ({ base }, maxRetries = 0) =>
  new OpenAI({ baseURL: `${base}/v1`, apiKey: "made up", maxRetries, timeout: 100_000 });
const text = (chunk) => chunk.choices[0]?.delta.content;
const delta = (event) => (event.type === "response.output_text.delta" ? event.delta : "");

export const operations = {
  async whole(talk, model) {
    const answer = await client(talk).chat.completions.create({ model, messages: asked });
    return answer.choices[0].message.content;
  },
  async stream(talk, model) {
    const given = { model, messages: asked, stream: true };
    await read(await client(talk).chat.completions.create(given), talk, text);
  },
  async tools(talk, model) {
    const given = { model, messages: callsTool, tools };
    const { message } = (await client(talk).chat.completions.create(given)).choices[0];
    return message.tool_calls.map(({ function: f }) => [f.name, JSON.parse(f.arguments)]);
  },
  async "tools-stream"(talk, model) {
    const given = { model, messages: callsTool, tools };
    const { message } = (await client(talk).chat.completions.stream(given).finalChatCompletion())
      .choices[0];
    return message.tool_calls.map(({ function: f }) => [f.name, JSON.parse(f.arguments)]);
  },
  async responses(talk, model) {
    return (await client(talk).responses.create({ model, input: "who?" })).output_text;
  },
  async "responses-stream"(talk, model) {
    const stream = await client(talk).responses.create({ model, input: "who?", stream: true });
    await read(stream, talk, delta);
  },
  async "responses-tools"(talk, model) {
    const given = { model, input: callsTool, tools: responsesTools };
    const { output } = await client(talk).responses.create(given);
    return output.map((each) => [each.name, JSON.parse(each.arguments)]);
  },
  async embed(talk, model) {
    const { data } = await client(talk).embeddings.create({ model, input: ["a", "b"] });
    return data.map((each) => each.embedding);
  },
  async list(talk) {
    const found = [];
    for await (const each of client(talk).models.list()) found.push(each.id);
    return found.sort();
  },
  async abort(talk, model) {
    const stream = await client(talk).chat.completions.create({
      model,
      messages: asked,
      stream: true,
    });
    await read(stream, talk, text, () => stream.controller.abort());
  },
  async "abort-whole"(talk, model) {
    await untilTold(talk, (signal) =>
      client(talk).chat.completions.create({ model, messages: asked }, { signal }),
    );
  },
  async "responses-abort-whole"(talk, model) {
    await untilTold(talk, (signal) =>
      client(talk).responses.create({ model, input: "who?" }, { signal }),
    );
  },
  async again(talk, model) {
    return await waits(() => client(talk, 2).chat.completions.create({ model, messages: asked }));
  },
};
