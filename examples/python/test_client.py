"""The example client and Google's own stubs for health and error details against a running server.

Started by test.sh, which gives the server's address, an admin key and the folder of fixtures.
"""

import json
import os
import pathlib
import subprocess
import sys
import unittest

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

import generate

ADDRESS = os.environ["OPENLORA_SERVER"].removeprefix("http://")
KEY = os.environ["OPENLORA_API_KEY"]
GOLDEN = pathlib.Path(os.environ["OPENLORA_TEST_FIXTURES"]) / "golden"


def field_violations(error):
    """{field: description} of a BadRequest detail."""
    found = {}
    for detail in rpc_status.from_call(error).details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            found.update({violation.field: violation.description for violation in bad.field_violations})
    return found


class ClientTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.client = generate.Client(ADDRESS, KEY)

    def upload(self, alias, folder):
        request = self.client.message("UploadAdapterRequest")

        def parts():
            yield request(header={"alias": alias, "replace": True})
            for name in ["adapter_config.json", "adapter_model.safetensors"]:
                data = (folder / name).read_bytes()
                for start in range(0, len(data), 1 << 16):
                    yield request(chunk={"file": name, "data": data[start : start + (1 << 16)]})

        return self.client.method("Adapters", "Upload")(parts())

    def answer(self, case, adapter=""):
        """Greedy tokens for a golden case, with log-probabilities of prompt and answer."""
        request = self.client.message("GenerateRequest")(
            adapter=adapter,
            token_ids={"ids": case["prompt_ids"]},
            sampling={"temperature": 0.0, "max_tokens": len(case["greedy"])},
            output={"token_ids": True, "logprobs": 10, "prompt_logprobs": 0},
        )
        return self.client.method("Inference", "Generate")(request)

    def check(self, case, adapter=""):
        response = self.answer(case, adapter)
        scored = [entry.chosen.logprob for entry in response.prompt_logprobs]
        self.assertEqual(len(scored), len(case["prompt_logprobs"]))
        for ours, theirs in zip(scored, case["prompt_logprobs"]):
            self.assertAlmostEqual(ours, theirs, delta=2e-3)
        sample = response.samples[0]
        for i, margin in enumerate(case["greedy_margin"]):
            if margin <= 1e-2:
                break
            self.assertEqual(sample.token_ids[i], case["greedy"][i], f"token {i}")
        for ours, (token, logprob) in zip(sample.logprobs[0].top, case["top10"]):
            self.assertAlmostEqual(ours.logprob, logprob, delta=2e-3)
        return response

    def test_base_model_answers_as_transformers_does(self):
        for case in json.loads((GOLDEN / "base.json").read_text()):
            self.assertEqual(self.check(case).generation, "")

    def test_uploaded_adapters_answer_as_peft_does(self):
        for name in ["cwe-r8", "wordnet-r8"]:
            adapter = self.upload(f"python/{name}", GOLDEN / "trained" / name)
            for case in json.loads((GOLDEN / "trained" / f"{name}.expected.json").read_text()):
                self.assertEqual(self.check(case, f"python/{name}").generation, adapter.generation)

    def test_the_example_streams_an_answer(self):
        script = pathlib.Path(generate.__file__)
        command = [sys.executable, str(script), "What is the capital of France?"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        self.assertIn("Paris", done.stdout)
        self.assertIn("generation base", done.stdout)

    def test_reflection_lists_every_service(self):
        services = set(ProtoReflectionDescriptorDatabase(self.client.channel).get_services())
        expected = {"openlora.v1.Inference", "openlora.v1.Adapters", "openlora.v1.Server", "grpc.health.v1.Health"}
        self.assertLessEqual(expected, services)

    def test_health_needs_no_key(self):
        stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(ADDRESS))
        for service in ["", "openlora.v1.Inference"]:
            status = stub.Check(health_pb2.HealthCheckRequest(service=service)).status
            self.assertEqual(status, health_pb2.HealthCheckResponse.SERVING)

    def test_errors_name_the_field(self):
        request = self.client.message("GenerateRequest")(text="x", sampling={"top_p": 2.0})
        with self.assertRaises(grpc.RpcError) as caught:
            self.client.method("Inference", "Generate")(request)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn("sampling.top_p", field_violations(caught.exception))

    def test_a_wrong_key_is_refused_and_not_repeated(self):
        client = generate.Client(ADDRESS, "olk_" + "0" * 64)
        stub = client.channel.unary_unary("/openlora.v1.Server/GetInfo", lambda _: b"", lambda data: data)
        with self.assertRaises(grpc.RpcError) as caught:
            stub(None)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.UNAUTHENTICATED)
        self.assertNotIn("0" * 64, str(caught.exception))


if __name__ == "__main__":
    unittest.main()
