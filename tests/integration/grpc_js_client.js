// A client in another language: asks for a recommendation and prints the reply as JSON.
// Arguments: address, folder of the .proto files, the request as JSON. Finds its packages by NODE_PATH.
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, protos, request] = process.argv.slice(2);
const definition = loader.loadSync("atspeed/v1/recommendation.proto", {
  includeDirs: [protos],
  longs: String,
  enums: String,
});
const { RecommendationService } = grpc.loadPackageDefinition(definition).atspeed.v1;
const client = new RecommendationService(address, grpc.credentials.createInsecure());

client.Recommend(JSON.parse(request), { deadline: Date.now() + 60_000 }, (error, reply) => {
  console.log(JSON.stringify(error ? { code: error.code, details: error.details } : reply));
  client.close();
});
