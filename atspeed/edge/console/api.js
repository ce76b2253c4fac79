// Calls of the service, by the JSON paths of docs/http.md on the same origin.

/** The answer of a path. token, track: empty for none. Throws an Error with the service's own text. */
export async function call(path, body, { token = "", track = "" } = {}) {
  const headers = { "content-type": "application/json", "grpc-timeout": "60S" };
  if (token) headers.authorization = `Bearer ${token}`;
  if (track) headers["x-atspeed-track"] = track;
  const options = body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers };
  let reply;
  try {
    reply = await fetch(path, { ...options, credentials: "omit", cache: "no-store" });
  } catch {
    throw new Error("The service did not answer.");
  }
  const text = await reply.text();
  if (!reply.ok) throw new Error(problem(reply.status, text));
  return JSON.parse(text);
}

function problem(status, text) {
  try {
    return `${JSON.parse(text).message} (HTTP ${status})`;
  } catch {
    return `The service answered with HTTP ${status}.`;
  }
}
