//! Signed bytes, and what they offer.

use alloy::{
    consensus::{SignableTransaction as _, TxEip1559, TxEnvelope},
    eips::eip2718::{Decodable2718 as _, Encodable2718 as _},
    primitives::U256,
};

use crate::{
    SettlementError,
    fees::Fees,
    keys::Signer,
    outbox::{Signed, UnixMs},
};

/// Signs a transaction.
pub(crate) async fn sign(signer: &Signer, transaction: TxEip1559, now: UnixMs) -> Result<Signed, SettlementError> {
    let signature = signer.sign(&transaction.signature_hash()).await?;
    let envelope = TxEnvelope::from(transaction.into_signed(signature));
    Ok(Signed { hash: *envelope.tx_hash(), raw: envelope.encoded_2718(), signed: now })
}

/// Bytes of a transaction before its signature.
pub(crate) fn unsigned(transaction: &TxEip1559) -> Vec<u8> {
    transaction.encoded_for_signing()
}

/// What was signed.
pub(crate) fn decode(signed: &Signed) -> Result<TxEip1559, SettlementError> {
    match TxEnvelope::decode_2718_exact(&signed.raw) {
        Ok(TxEnvelope::Eip1559(transaction)) => Ok(transaction.strip_signature()),
        _ => Err(SettlementError::BrokenTransaction { hash: signed.hash }),
    }
}

pub(crate) fn fees(transaction: &TxEip1559) -> Fees {
    Fees { max_fee: transaction.max_fee_per_gas, tip: transaction.max_priority_fee_per_gas }
}

/// What a transaction takes from its account at most, but for the fee for its bytes.
pub(crate) fn takes_max(transaction: &TxEip1559) -> U256 {
    fees(transaction).cost_max(transaction.gas_limit, transaction.value)
}
