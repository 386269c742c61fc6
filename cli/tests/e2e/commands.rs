//! The commands people type.

use std::process::{Command, Output};

use serde_json::Value;

use crate::support::{OPENLORA, Server, fixtures};

fn text(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    out.into_owned()
}

fn json(output: &Output) -> Value {
    serde_json::from_str(&text(output)).expect("JSON")
}

fn failure(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn an_owner_registers_inspects_verifies_and_removes_an_adapter() {
    let server = Server::start(&[]);
    let folder = fixtures().join("golden/trained/cwe-r8");
    let folder = folder.to_str().expect("a path");
    let inspected = json(&server.openlora(&["adapter", "inspect", folder, "--json"]));
    let added = json(&server.openlora(&["adapter", "add", "admin/cwe", folder, "--json"]));
    assert_eq!(added["generation"], inspected["generation"]);
    assert_eq!(added["rank_max"], 8);
    assert_eq!(added["sites"], 60);
    let listed = text(&server.openlora(&["adapter", "ls"]));
    assert!(listed.contains("admin/cwe") && listed.contains("device: 0 adapters in 0 of"), "{listed}");
    let verified = server.openlora(&["adapter", "verify", folder, "--alias", "admin/cwe"]);
    assert!(text(&verified).contains("serves exactly this"));
    let other = fixtures().join("golden/trained/wordnet-r8");
    let verified = server.openlora(&["adapter", "verify", other.to_str().expect("a path"), "--alias", "admin/cwe"]);
    assert_eq!(verified.status.code(), Some(1));
    let taken = failure(&server.openlora(&["adapter", "add", "admin/cwe", folder]));
    assert!(taken.contains("admin/cwe"), "{taken}");
    let full = server.openlora(&["adapter", "quota", "admin", "--adapters-max", "1", "--json"]);
    assert_eq!((&json(&full)["adapters"], &json(&full)["bytes"]), (&1.into(), &added["bytes"]));
    let refused = failure(&server.openlora(&["adapter", "add", "admin/more", folder]));
    assert!(refused.contains("owner_adapters_max is 1"), "{refused}");
    let both = json(&server.openlora(&["adapter", "quota", "admin", "--bytes-max", "7", "--json"]));
    assert_eq!((&both["adapters_max"], &both["bytes_max"]), (&1.into(), &7.into()), "a bound that is not named stays");
    text(&server.openlora(&["adapter", "quota", "admin", "--configured"]));
    let shown = text(&server.openlora(&["adapter", "quota"]));
    assert!(shown.contains("1 of 100000 adapters (from the server's settings)"), "{shown}");
    text(&server.openlora(&["adapter", "rm", "admin/cwe"]));
    assert!(text(&server.openlora(&["adapter", "ls"])).contains("no adapters yet"));
    let missing = failure(&server.openlora(&["generate", "--adapter", "admin/cwe", "x"]));
    assert!(missing.contains("admin/cwe"), "{missing}");
}

#[test]
fn generate_streams_text_and_prints_json() {
    let server = Server::start(&[]);
    let folder = fixtures().join("golden/trained/cwe-r8");
    text(&server.openlora(&["adapter", "add", "admin/cwe", folder.to_str().expect("a path")]));
    // A golden prompt; its first tokens are far from ties, so that quantised kernels give them too.
    let question = "Explain why the sky is blue in one sentence.";
    let said = text(&server.openlora(&["generate", "--temperature", "0", "--max-tokens", "8", question]));
    assert!(said.starts_with("The sky is blue"), "{said}");
    let answer = json(&server.openlora(&[
        "generate",
        "--json",
        "--temperature",
        "0",
        "--logprobs",
        "2",
        "--adapter",
        "admin/cwe",
        question,
    ]));
    assert_eq!(answer["token_ids"].as_array().map(Vec::len), answer["logprobs"].as_array().map(Vec::len));
    assert_eq!(answer["logprobs"][0]["top"].as_array().map(Vec::len), Some(2));
    assert_eq!(answer["generation"].as_str().map(str::len), Some(64));
    let stopped = json(&server.openlora(&["generate", "--json", "--temperature", "0", "--stop", " blue", question]));
    assert_eq!(stopped["text"], "The sky is");
    assert_eq!(stopped["finish_reason"], "stop");
}

#[test]
fn errors_name_the_next_command() {
    let home = tempfile::tempdir().expect("a folder");
    let openlora = |args: &[&str]| {
        Command::new(OPENLORA).env("OPENLORA_HOME", home.path()).env_remove("OPENLORA_MODEL_PATH").args(args).output()
    };
    let no_model = failure(&openlora(&["model", "inspect"]).expect("runs"));
    assert!(no_model.contains("scripts/fetch-model.sh"), "{no_model}");
    let no_server = failure(&openlora(&["generate", "--server", "http://127.0.0.1:1", "x"]).expect("runs"));
    assert!(no_server.contains("openlora serve"), "{no_server}");
    let exposed = failure(
        &openlora(&["serve", "--insecure-no-auth", "--grpc-addr", "0.0.0.0:0", "--http-addr", "127.0.0.1:0"])
            .expect("runs"),
    );
    assert!(exposed.contains("openlora key create"), "{exposed}");
    let no_gpu = failure(&openlora(&["serve", "--insecure-no-auth", "--device", "cuda:999"]).expect("runs"));
    assert!(no_gpu.contains("engine.device is cuda:999") && no_gpu.contains("openlora doctor"), "{no_gpu}");
    let pickled = home.path().join("pickled");
    std::fs::create_dir(&pickled).expect("a folder");
    std::fs::write(pickled.join("adapter_config.json"), "{}").expect("written");
    std::fs::write(pickled.join("adapter_model.bin"), "").expect("written");
    let refused = failure(&openlora(&["adapter", "add", "x/y", pickled.to_str().expect("a path")]).expect("runs"));
    assert!(refused.contains("safe_serialization"), "{refused}");
    assert_eq!(openlora(&["no-such-command"]).expect("runs").status.code(), Some(2));
}

#[test]
fn doctor_config_model_and_completions_ask_no_server() {
    let server = Server::start(&[]);
    let doctor = json(&server.openlora(&["doctor", "--json"]));
    assert_eq!(doctor["ok"], true, "{doctor}");
    let broken = server.openlora(&["doctor", "--config", "/nonexistent.toml"]);
    assert_eq!(broken.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&broken.stdout).contains("/nonexistent.toml"));
    let log = server.log();
    assert!(log.contains("device chosen") && log.contains("engine.device is cpu"), "{log}");
    let shown = text(&server.openlora(&["config", "show", "--origin"]));
    assert!(shown.contains("environment OPENLORA_MODEL_PATH"), "{shown}");
    assert!(shown.contains("engine.device = \"auto\"  # default"), "{shown}");
    text(&server.openlora(&["config", "check"]));
    let model = json(&server.openlora(&["model", "inspect", "--json"]));
    assert_eq!(model["shape"]["layers"], 30);
    assert_eq!(model["tensors"].as_array().map(Vec::len), Some(272));
    assert!(text(&server.openlora(&["completions", "bash"])).contains("_openlora"));
}

/// A fixture's copy whose scale is changed: every number in it is finite, what it computes is not.
fn overflowing(folder: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a folder");
    let from = fixtures().join(folder);
    std::fs::copy(from.join("adapter_model.safetensors"), copy.path().join("adapter_model.safetensors"))
        .expect("copied");
    let config = std::fs::read_to_string(from.join("adapter_config.json")).expect("a fixture");
    let mut config: Value = serde_json::from_str(&config).expect("JSON");
    config["lora_alpha"] = 1e30.into();
    std::fs::write(copy.path().join("adapter_config.json"), config.to_string()).expect("written");
    copy
}

const TINY: &str = "models/llama3";
const TINY_ADAPTER: &str = "adapters-tiny/llama3/all-linear";

#[test]
fn an_owner_checks_an_adapter_without_a_server() {
    let home = tempfile::tempdir().expect("a folder");
    let model = fixtures().join(TINY);
    let check = |folder: &std::path::Path, more: &[&str]| {
        let mut command = Command::new(OPENLORA);
        command.env("OPENLORA_HOME", home.path()).env_remove("OPENLORA_MODEL_PATH");
        command.env("OPENLORA_ENGINE_DEVICE", "cpu");
        command.args(["adapter", "check"]).arg(folder).arg("--model").arg(&model).args(more).output().expect("runs")
    };
    let good = fixtures().join(TINY_ADAPTER);
    let checked = json(&check(&good, &["--json"]));
    assert_eq!((&checked["ok"], &checked["problems"]), (&true.into(), &Value::Array(vec![])), "{checked}");
    assert_eq!(checked["generation"].as_str().map(str::len), Some(64));
    assert_eq!(checked["probe"]["tokens"], 32);
    assert!(checked["probe"]["effect_max"].as_f64().expect("a number") > 0.0, "{checked}");
    let table = text(&check(&good, &[]));
    assert!(table.contains("mean KL") && table.ends_with("would be registered\n"), "{table}");

    let bad = overflowing(TINY_ADAPTER);
    let refused = check(bad.path(), &[]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stdout);
    assert!(said.contains("would be refused") && said.contains("leaves no next token"), "{said}");
    let refused = check(bad.path(), &["--json"]);
    assert_eq!(refused.status.code(), Some(1));
    let refused: Value = serde_json::from_slice(&refused.stdout).expect("JSON");
    assert_eq!((&refused["ok"], &refused["generation"]), (&false.into(), &Value::Null), "{refused}");
    assert!(refused["probe"]["lost"].as_u64() > Some(0), "{refused}");

    // What is wrong with the files is said as by `inspect`, before any model is loaded.
    std::fs::write(bad.path().join("adapter_model.safetensors"), "").expect("written");
    assert!(!check(bad.path(), &[]).status.success());
    assert_eq!(std::fs::read_dir(home.path()).expect("the home").count(), 0, "a check leaves nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_the_probe_on_refuses_what_overflows_and_keeps_nothing_of_it() {
    let model = fixtures().join(TINY);
    let model = model.to_str().expect("a path");
    let server = Server::start(&[("OPENLORA_MODEL_PATH", model), ("OPENLORA_ADAPTERS_PROBE", "true")]);
    let client = server.client().await;
    let bad = overflowing(TINY_ADAPTER);
    let error = client.upload("admin/bad", bad.path().to_str().expect("a path"), false).await.expect_err("refused");
    assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");
    assert!(error.message().contains("leaves no next token"), "{error}");
    for folder in ["staging", "adapters"] {
        let left = std::fs::read_dir(server.home.path().join("adapters").join(folder)).expect("the store's folder");
        assert_eq!(left.count(), 0, "{folder}");
    }
    let good = client.upload("admin/good", TINY_ADAPTER, false).await.expect("passes");
    let request = crate::support::greedy("admin/good", &[1, 2, 3], 4);
    assert_eq!(client.generate(request).await.expect("answers").generation, good.generation);
    assert!(server.log().contains("adapter probed"), "{}", server.log());

    // Off, as by default, the same adapter is taken as before: nothing is computed with it.
    let plain = Server::start(&[("OPENLORA_MODEL_PATH", model)]);
    let taken = plain.client().await.upload("admin/bad", bad.path().to_str().expect("a path"), false).await;
    taken.expect("not tried");
    assert!(!plain.log().contains("probed"), "{}", plain.log());
}
