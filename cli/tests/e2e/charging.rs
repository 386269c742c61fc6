//! Served requests are paid for, whatever becomes of the server, and divided by their receipts.

use openlora_proto::v1::GenerateRequest;
use serde_json::{Value, json};
use tokio_stream::StreamExt as _;

use crate::support::{Server, create_key, greedy};

/// What the application has at first.
const PREPAID: u64 = 1_000_000;

/// What a command of the server's administrator answers.
fn json(server: &Server, args: &[&str]) -> Value {
    let output = server.openlora(&[&["--json"], args].concat());
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn has(server: &Server, account: &str) -> u64 {
    let holding = json(server, &["ledger", "balance", account]);
    holding["available"].as_str().expect("an amount").parse().expect("a number")
}

/// A request that has all the tokens it may.
fn asked(prompt: &[u32], max_tokens: usize) -> GenerateRequest {
    let mut request = greedy("admin/cwe", prompt, max_tokens);
    request.sampling.as_mut().expect("sampling").ignore_eos = Some(true);
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn a_served_request_is_paid_for_and_divided_by_its_receipt() {
    let charging = [("OPENLORA_LEDGER_CHARGE", "true"), ("OPENLORA_LEDGER_BASE_OWNER", "lab")];
    let home = tempfile::tempdir().expect("a folder for the server");
    let shop = create_key(home.path(), "app", "shop");
    let server = Server::start_in(home, &charging);
    let client = server.client_with(&shop).await;
    server.client().await.upload("admin/cwe", "golden/trained/cwe-r8", false).await.expect("uploaded");

    // What people read first: the next command is in each refusal.
    let refused = |status: tonic::Status, says: &str| assert!(status.message().contains(says), "{status}");
    let request = || asked(&[1, 2, 3, 4], 4);
    refused(client.generate(request()).await.expect_err("no prices"), "set one first");
    let price = ["--prompt", "10000000", "--cached", "0", "--completion", "100000000", "--key", "p"];
    json(&server, &[&["ledger", "price", "adapters"], &price[..]].concat());
    let split =
        ["--owner", "2000", "--contributors", "5000", "--base-owner", "1000", "--operator", "2000", "--key", "s"];
    json(&server, &[&["ledger", "split", "adapters"], &split[..]].concat());
    refused(client.generate(request()).await.expect_err("no deposit"), "deposit");
    json(&server, &["ledger", "deposit", "shop", &PREPAID.to_string(), "--key", "d"]);

    // 4 tokens at 10 and 4 at 100.
    let answer = client.generate(request()).await.expect("answered");
    assert_eq!(has(&server, "application/shop"), PREPAID - 440);
    let [owner, held, base] = ["owner/admin", "held", "base/lab"].map(|account| has(&server, account));
    assert_eq!((owner, held, base), (88, 220, 44));
    let shares = server.home.path().join("shares.jsonl");
    let line = json!({"receipt": answer.receipt_id, "shares": [["ann", 3], ["bob", 1]], "unattributed": 1});
    std::fs::write(&shares, format!("{line}\n")).expect("written");
    for _ in 0..2 {
        // Read again, nothing changes.
        let shares = shares.to_str().expect("UTF-8");
        assert_eq!(json(&server, &["ledger", "attribute", shares]), json!({"attributed": 1}));
    }
    let [ann, bob, pool] = ["contributor/ann", "contributor/bob", "pool"].map(|account| has(&server, account));
    assert_eq!((ann, bob, pool), (132, 44, 44));
    let unknown = json!({"receipt": "0".repeat(32), "shares": [["ann", 1]]});
    std::fs::write(&shares, format!("{unknown}\n")).expect("written");
    let output = server.openlora(&["ledger", "attribute", shares.to_str().expect("UTF-8")]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("line 1") && error.contains(&"0".repeat(32)), "{error}");

    // Killed while it answers: what was set aside is still there, for a sweep to give back, and nothing was paid.
    let mut running = client.inference().generate_stream(asked(&[1, 2, 3], 1_000)).await.expect("started");
    running.get_mut().next().await.expect("a message").expect("a token");
    let server = Server::start_in(server.kill(), &charging);
    assert_eq!(has(&server, "pending/shop"), 3 * 10 + 1_000 * 100);
    assert_eq!(has(&server, "application/shop"), PREPAID - 440 - (3 * 10 + 1_000 * 100));
    assert_eq!(json(&server, &["ledger", "verify"])["ok"], true);
}
