//! The wire interface: `openlora/v1/openlora.proto`, `settlement.proto` beside it and the code generated from them, nothing
//! else. Only the server, the command line and the load generator see these types.

/// Package `openlora.v1`.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("openlora.v1");
}

/// The encoded `FileDescriptorSet`, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/openlora_descriptor.bin"));
