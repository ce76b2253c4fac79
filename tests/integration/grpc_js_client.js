// A client in another language: asks for a recommendation and prints the reply as JSON, or the error with its decoded details.
// Arguments: address, folder of the .proto files, the request as JSON. Finds its packages by NODE_PATH.
const path = require("path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const protobuf = require("protobufjs");

const [address, protos, request] = process.argv.slice(2);
const definition = loader.loadSync("atspeed/v1/recommendation.proto", {
  includeDirs: [protos],
  longs: String,
  enums: String,
});
const { RecommendationService } = grpc.loadPackageDefinition(definition).atspeed.v1;
const client = new RecommendationService(address, grpc.credentials.createInsecure());

function details(error) {
  const root = new protobuf.Root();
  root.resolvePath = (_origin, name) => path.join(protos, name);
  root.loadSync(["google/rpc/status.proto", "google/rpc/error_details.proto"]);
  const [encoded] = error.metadata.get("grpc-status-details-bin");
  const status = root.lookupType("google.rpc.Status").decode(encoded);
  const decoded = status.details.map((any) => {
    const type = root.lookupType(any.type_url.split("/").pop());
    return [type.name, type.toObject(type.decode(any.value), { longs: String })];
  });
  return { code: status.code, message: status.message, ...Object.fromEntries(decoded) };
}

client.Recommend(JSON.parse(request), { deadline: Date.now() + 60_000 }, (error, reply) => {
  console.log(JSON.stringify(error ? { code: error.code, details: error.details, status: details(error) } : reply));
  client.close();
});
