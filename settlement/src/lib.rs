//! From a ledger's epochs to an EVM Layer-2: payout trees and what is published of them, transactions that are sent exactly
//! once, and a watcher that challenges wrong roots. The only room that speaks to a chain.
//!
//! Where to start: [`tree`] is what accounts are paid by, [`sender`] gets transactions onto the chain.

pub mod chain;
mod error;
pub mod fees;
pub mod keys;
pub mod outbox;
mod preflight;
mod rpc;
pub mod sender;
mod transaction;
pub mod tree;
mod turn;

pub use error::SettlementError;
pub use rpc::{RpcConfig, RpcError, RpcUrl};
