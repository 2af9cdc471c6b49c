// What is asked, whichever library asks.

export const asked = [{ role: "user", content: "who sleeps?" }];
export const callsTool = [{ role: "user", content: "call get_weather" }];
export const schema = { type: "object", properties: { city: { type: "string" } } };
export const tool = { name: "get_weather", description: "The weather", parameters: schema };

// Reads a stream to its end, or aborts once two parts have come.
export async function read(stream, { part }, textOf, abort) {
  let parts = 0;
  for await (const each of stream) {
    const text = textOf(each);
    if (!text) continue;
    part(text);
    if (++parts === 2 && abort) abort();
  }
}

// Calls, with a signal that is given when the next line comes.
export async function untilTold({ told }, call) {
  const controller = new AbortController();
  const calling = call(controller.signal);
  calling.catch(() => {}); // it is awaited below
  await told();
  controller.abort();
  return await calling;
}

// How long, in ms, the library would have waited between its tries; nothing waits here. Timers of
// node itself and those of the library that limit a whole call are left alone.
export async function waits(call) {
  const real = globalThis.setTimeout;
  const waited = [];
  globalThis.setTimeout = (then, ms, ...rest) => {
    const isTry = ms < 100_000 && new Error().stack.includes("node_modules");
    if (isTry) waited.push(ms);
    return real(then, isTry ? 0 : ms, ...rest);
  };
  try {
    await call();
  } catch (error) {
    return { waited, status: error.status };
  } finally {
    globalThis.setTimeout = real;
  }
}
