#!/usr/bin/env python3
"""A client with nothing but grpcio: stubs are made from what the server says of itself through reflection.

    pip install grpcio grpcio-reflection protobuf
    OPENLORA_API_KEY=… python examples/python/generate.py --adapter acme/cwe "What is CWE-79?"
"""

import argparse
import os

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class Client:
    """Calls methods of `openlora.v1` by name; messages are dictionaries' keyword arguments."""

    def __init__(self, address, key):
        channel = grpc.insecure_channel(address)
        self.metadata = [("authorization", f"Bearer {key}")] if key else []
        self.channel = grpc.intercept_channel(channel, _WithMetadata(self.metadata))
        self.pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))

    def message(self, name):
        """The class of message `openlora.v1.NAME`."""
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(f"openlora.v1.{name}"))

    def method(self, service, name):
        """A callable for `openlora.v1.SERVICE/NAME`."""
        method = self.pool.FindServiceByName(f"openlora.v1.{service}").FindMethodByName(name)
        kinds = {
            (False, False): self.channel.unary_unary,
            (False, True): self.channel.unary_stream,
            (True, False): self.channel.stream_unary,
        }
        make = kinds[method.client_streaming, method.server_streaming]
        return make(
            f"/openlora.v1.{service}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )


class _WithMetadata(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Puts the key into every call, reflection included."""

    def __init__(self, metadata):
        self.metadata = metadata

    def _call(self, proceed, details, request):
        return proceed(details._replace(metadata=[*(details.metadata or []), *self.metadata]), request)

    def intercept_unary_unary(self, continuation, client_call_details, request):
        return self._call(continuation, client_call_details, request)

    def intercept_unary_stream(self, continuation, client_call_details, request):
        return self._call(continuation, client_call_details, request)

    def intercept_stream_unary(self, continuation, client_call_details, request_iterator):
        return self._call(continuation, client_call_details, request_iterator)

    def intercept_stream_stream(self, continuation, client_call_details, request_iterator):
        return self._call(continuation, client_call_details, request_iterator)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--adapter", default="")
    parser.add_argument("--server", default=os.environ.get("OPENLORA_SERVER", "http://127.0.0.1:50051"))
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()

    client = Client(args.server.removeprefix("http://"), os.environ.get("OPENLORA_API_KEY", ""))
    request = client.message("GenerateRequest")(
        adapter=args.adapter,
        chat={"messages": [{"role": "user", "content": args.question}]},
        sampling={"temperature": 0.0, "max_tokens": args.max_tokens},
    )
    for part in client.method("Inference", "GenerateStream")(request):
        print(part.text, end="", flush=True)
        if part.HasField("usage"):
            print(f"\n[{part.usage.completion_tokens} tokens, generation {part.generation[:12] or 'base'}]")


if __name__ == "__main__":
    main()
