//! Owners beside each other: what each has and may have, and that none reaches another's adapters.

use openlora_proto::v1 as wire;
use openlora_server::keys::Role;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::harness::{TestServer, fixture, name_of, request, text};

fn register(alias: &str, folder: &str) -> wire::RegisterAdapterRequest {
    let path = fixture("adapters-tiny/llama3").join(folder).display().to_string();
    wire::RegisterAdapterRequest { alias: alias.into(), path, ..Default::default() }
}

fn quota_of(owner: &str) -> wire::GetQuotaRequest {
    wire::GetQuotaRequest { owner: owner.into() }
}

fn assert_refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, what: &str) {
    assert_eq!(answer.expect_err(what).code(), code, "{what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_reaches_nothing_of_anothers() {
    let server = TestServer::start().await;
    let (mut a, mut b) = (server.adapters_of("alice").await, server.adapters_of("bob").await);
    let hers = a.register(register("alice/x", "all-linear")).await.expect("registered").into_inner();
    let his = b.register(register("bob/x", "embed-head")).await.expect("registered").into_inner();
    let get = || wire::GetAdapterRequest { alias: "alice/x".into() };
    let set = |alias: &str, expected: &str| wire::SetAliasRequest {
        alias: alias.into(),
        generation: hers.generation.clone(),
        expected_generation: expected.into(),
    };
    let point_hers_at_his =
        wire::SetAliasRequest { generation: his.generation.clone(), ..set("alice/x", &hers.generation) };
    let replace = wire::RegisterAdapterRequest { replace: Some(true), ..register("alice/x", "embed-head") };
    let unregister = wire::UnregisterAdapterRequest { alias: "alice/x".into() };
    let pin = wire::PinAdapterRequest { alias: "alice/x".into(), pinned: true };

    assert_refused(b.get(get()).await, Code::NotFound, "get");
    assert_refused(b.register(replace).await, Code::PermissionDenied, "replace");
    assert_refused(b.register(register("alice/y", "embed-head")).await, Code::PermissionDenied, "her namespace");
    assert_refused(b.unregister(unregister).await, Code::PermissionDenied, "unregister");
    assert_refused(b.pin(pin).await, Code::PermissionDenied, "pin");
    assert_refused(b.set_alias(point_hers_at_his).await, Code::PermissionDenied, "point hers elsewhere");
    assert_refused(b.get_quota(quota_of("alice")).await, Code::PermissionDenied, "her quota");
    // Her generation's hash alone gives no access, for a new name or for one he has.
    assert_refused(b.set_alias(set("bob/y", "")).await, Code::NotFound, "a new name for hers");
    assert_refused(b.set_alias(set("bob/x", &his.generation)).await, Code::NotFound, "his name for hers");
    let listed = b.list(wire::ListAdaptersRequest::default()).await.expect("a page").into_inner();
    assert_eq!(listed.adapters, [his]);

    assert_eq!(a.get(get()).await.expect("hers").into_inner(), hers, "as it was");
    let listed = a.list(wire::ListAdaptersRequest::default()).await.expect("a page").into_inner();
    assert_eq!(listed.adapters, std::slice::from_ref(&hers));
    let asked = wire::GenerateRequest { adapter: "alice/x".into(), ..request(text("The river"), 1) };
    let answer = server.inference(Role::App).await.generate(asked).await.expect("answered").into_inner();
    assert_eq!(answer.generation, hers.generation);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_sees_their_quota_and_an_administrator_sets_it() {
    let server = TestServer::start_with(|setup| setup.limits.owner_adapters_max = 2).await;
    let (mut owner, mut admin) = (server.adapters(Role::Owner).await, server.adapters(Role::Admin).await);
    let name = name_of(Role::Owner);
    let names = |last: &str| format!("{}/{last}", name_of(Role::Owner));
    let bytes = owner.register(register(&names("a"), "all-linear")).await.expect("registered").into_inner().bytes;
    let configured = wire::Quota {
        owner: name.clone(),
        adapters: 1,
        bytes,
        adapters_max: 2,
        bytes_max: openlora_types::Limits::default().owner_bytes_max,
        adapters_max_is_own: false,
        bytes_max_is_own: false,
    };
    assert_eq!(owner.get_quota(quota_of("")).await.expect("their own").into_inner(), configured);
    assert_eq!(owner.get_quota(quota_of(&name)).await.expect("their own").into_inner(), configured);

    let set = |adapters_max, bytes_max| wire::SetQuotaRequest { owner: name.clone(), adapters_max, bytes_max };
    assert_refused(owner.set_quota(set(Some(9), None)).await, Code::PermissionDenied, "an owner sets");
    for owner in ["", "a/b", "../x"] {
        let status = admin.set_quota(wire::SetQuotaRequest { owner: owner.into(), ..set(None, None) }).await;
        let status = status.expect_err("no owner's name");
        let fields = status.get_details_bad_request().expect("BadRequest").field_violations;
        assert_eq!((status.code(), fields[0].field.as_str()), (Code::InvalidArgument, "owner"));
    }
    let tight = admin.set_quota(set(Some(1), Some(bytes))).await.expect("set").into_inner();
    let own = wire::Quota {
        adapters_max: 1,
        bytes_max: bytes,
        adapters_max_is_own: true,
        bytes_max_is_own: true,
        ..configured.clone()
    };
    assert_eq!(tight, own);
    let full = owner.register(register(&names("b"), "all-linear")).await.expect_err("one is all");
    assert_eq!(full.code(), Code::ResourceExhausted, "{full}");
    assert_eq!(full.get_details_quota_failure().expect("QuotaFailure").violations[0].subject, "owner_adapters_max");
    let server = server.restart().await;
    let (mut owner, mut admin) = (server.adapters(Role::Owner).await, server.adapters(Role::Admin).await);
    assert_eq!(admin.get_quota(quota_of(&name)).await.expect("anybody's").into_inner(), own, "after a restart too");
    assert!(!admin.set_quota(set(Some(5), None)).await.expect("set").into_inner().bytes_max_is_own);
    owner.register(register(&names("b"), "all-linear")).await.expect("there is room");
}
