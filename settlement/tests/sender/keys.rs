//! What must never be written down: a whole life of an intent, with every event of every crate listened to.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt as _,
    sync::{Arc, Mutex},
};

use alloy::{hex, signers::local::PrivateKeySigner};
use openlora_settlement::{
    RpcUrl,
    chain::Chain,
    keys::{Password, Signer},
    outbox::Status,
    sender::{Sender, SenderConfig},
};
use serde_json::json;
use tracing_subscriber::fmt::MakeWriter;

use crate::{
    proxy::{Fault, Proxy},
    stage::{Stage, rpc, turn},
};

#[derive(Clone, Default)]
struct Events(Arc<Mutex<Vec<u8>>>);

impl Write for Events {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Events {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

const PASSWORD: &str = "correct horse battery";
const URL_KEY: &str = "url-key-0123456789";

/// A sender with a key of its own, made as an operator would, and the key's digits.
async fn operator(stage: &Stage, proxy: &Proxy) -> (Sender, String) {
    let file = |name| stage.dir.path().join(name);
    fs::write(file("password"), PASSWORD).expect("written");
    fs::set_permissions(file("password"), fs::Permissions::from_mode(0o600)).expect("set");
    let password = Password::read(&file("password")).expect("read");
    Signer::create(&file("key.json"), &password).expect("made");
    let signer = Signer::open(&file("key.json"), &password).expect("opened");
    let key = PrivateKeySigner::decrypt_keystore(file("key.json"), PASSWORD).expect("opened");
    stage.anvil.ask("anvil_setBalance", json!([signer.address(), "0x8ac7230489e80000"]));
    let url = RpcUrl::parse("rpc", &proxy.url(URL_KEY)).expect("a URL");
    let chain = Chain::open(&url, 31337, rpc(), |_| None).await.expect("anvil answers");
    let sender = Sender::new(chain, signer, Arc::clone(&stage.database), SenderConfig::default());
    (sender, hex::encode(key.to_bytes()))
}

#[tokio::test]
async fn neither_keys_nor_passwords_nor_url_credentials_are_in_events_errors_or_the_database() {
    let events = Events::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(events.clone())
        .finish();
    let _listening = tracing::subscriber::set_default(subscriber);
    let stage = Stage::new().await;
    let proxy = Proxy::start(stage.anvil.port).await;
    let (sender, key) = operator(&stage, &proxy).await;
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    proxy.fail("eth_sendRawTransaction", Fault::LoseAnswer);
    turn(&sender, 0).await;
    turn(&sender, 60_000).await;
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { reverted: None, .. }));
    let wrong = Password::new("wrong".into()).expect("text");
    let wrong = Signer::open(&stage.dir.path().join("key.json"), &wrong).expect_err("another password");
    for _ in 0..4 {
        proxy.fail("eth_chainId", Fault::Say(401, format!("{{\"error\":{{\"message\":\"who is {URL_KEY}\"}}}}")));
    }
    let error = sender.turn().await.expect_err("refused");
    let shown = format!("{wrong} {wrong:?} {error} {error:?} {sender:?} {:?}", sender.status(id).await);
    stage.database.close().await;
    let events = String::from_utf8(events.0.lock().expect("no panic").clone()).expect("text");
    assert!(events.contains("openlora_settlement") && events.contains("replaced"), "nothing was listened to: {events}");
    let stored = fs::read(stage.dir.path().join("outbox.db")).unwrap_or_default();
    let stored = String::from_utf8_lossy(&stored);
    for secret in [&*key, PASSWORD, URL_KEY] {
        for (place, text) in [("events", &*events), ("errors", &*shown), ("database", &*stored)] {
            assert!(!text.to_ascii_lowercase().contains(secret), "{place} hold a secret");
        }
    }
}

/// `OPENLORA_TEST_KMS_KEY` names a key of the KMS that `AWS_ENDPOINT_URL` and the other variables of AWS lead to.
#[cfg(feature = "aws-kms")]
#[tokio::test]
#[ignore = "needs a KMS; docs/sending.md says how to run one"]
async fn what_a_key_of_aws_kms_signs_is_taken_by_the_chain() {
    let stage = Stage::new().await;
    let proxy = Proxy::start(stage.anvil.port).await;
    let key = std::env::var("OPENLORA_TEST_KMS_KEY").expect("OPENLORA_TEST_KMS_KEY");
    let signer = Signer::kms(&key).await.expect("a key");
    stage.anvil.ask("anvil_setBalance", json!([signer.address(), "0x8ac7230489e80000"]));
    let url = RpcUrl::parse("rpc", &proxy.url(URL_KEY)).expect("a URL");
    let chain = Chain::open(&url, 31337, rpc(), |_| None).await.expect("anvil answers");
    let sender = Sender::new(chain, signer, Arc::clone(&stage.database), SenderConfig::default());
    let id = sender.submit(&stage.count(1)).await.expect("kept");
    turn(&sender, 0).await;
    assert!(matches!(stage.settle(&sender, id).await, Status::Finalized { reverted: None, .. }));
    let missing = Signer::kms("no-such-key").await.expect_err("no key");
    assert!(missing.to_string().contains("no-such-key"), "{missing}");
}
