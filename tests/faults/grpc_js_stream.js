// A client in another language that watches a server's health and pings every 10 s, as many gateways do. Prints what it saw.
// Arguments: address, seconds to watch. Finds its package by NODE_PATH; with GRPC_TRACE it tells of every ping on stderr.
const grpc = require("@grpc/grpc-js");

const [address, seconds] = process.argv.slice(2);
const client = new grpc.Client(address, grpc.credentials.createInsecure(), {
  "grpc.keepalive_time_ms": 10_000,
  "grpc.keepalive_timeout_ms": 5_000,
  "grpc.keepalive_permit_without_calls": 1,
});

const bytes = (message) => message;
const seen = { states: [], ended: false };
const stream = client.makeServerStreamRequest("/grpc.health.v1.Health/Watch", bytes, bytes, Buffer.alloc(0));
stream.on("data", (reply) => seen.states.push(reply.toString("hex")));
stream.on("error", () => (seen.ended = true));
stream.on("end", () => (seen.ended = true));
setTimeout(() => {
  console.log(JSON.stringify(seen));
  stream.removeAllListeners("error").on("error", () => {});
  stream.cancel();
  client.close();
}, 1000 * Number(seconds));
