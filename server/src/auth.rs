//! Who is calling, and what they may call: one table for every door. Step one of a request.
//!
//! **Invariant: authentication by default.** A path that is not in the table needs an administrator, so a new call is
//! closed until somebody decides who may make it.

use std::sync::Arc;

use openlora_adapters::Actor;
use openlora_types::{Alias, TenantId};
use tonic::codegen::http::HeaderMap;

use crate::keys::{KeyStore, Role};
use crate::{Auth, ServerError};

/// Bytes of an `authorization` or `x-api-key` header that are looked at.
const CREDENTIAL_BYTES_MAX: usize = 256;

/// An authenticated caller. Travels in the request's extensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    /// Name of the key: the tenant, and the namespace an owner's adapters live in.
    pub(crate) name: Arc<str>,
    /// What the key may do.
    pub(crate) role: Role,
}

impl Caller {
    pub(crate) fn tenant(&self) -> TenantId {
        TenantId(self.name.to_string())
    }

    pub(crate) fn actor(&self) -> Actor {
        Actor { name: self.name.to_string(), admin: self.role == Role::Admin }
    }

    /// Whether it may see every account.
    pub(crate) fn operates(&self) -> bool {
        matches!(self.role, Role::Operator | Role::Admin)
    }

    /// Refuses an alias outside the caller's namespace: `acme` and `acme/…` for the key named `acme`. Without it, the
    /// first owner to come could take the name another's applications ask for.
    pub(crate) fn check_namespace(&self, alias: &Alias) -> Result<(), ServerError> {
        let first = alias.as_str().split('/').next().unwrap_or_default();
        if self.role == Role::Admin || first == &*self.name {
            return Ok(());
        }
        Err(ServerError::OutsideNamespace { alias: alias.to_string(), owner: self.name.to_string() })
    }
}

/// What a call asks of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Nothing.
    Open,
    /// A key of any role.
    Key,
    /// A key of one of these roles.
    Roles(&'static [Role]),
}

const USE: Access = Access::Roles(&[Role::App, Role::Owner, Role::Admin]);
const CHANGE: Access = Access::Roles(&[Role::Owner, Role::Admin]);
const ADMIN: Access = Access::Roles(&[Role::Admin]);
const OPERATE: Access = Access::Roles(&[Role::Operator, Role::Admin]);

/// Who may read `/metrics`.
pub(crate) const METRICS: Access = OPERATE;

/// One gRPC call: its short name for metrics and spans, and its rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    /// `Service.Method`, or `other`: bounded, since callers choose paths.
    pub(crate) name: &'static str,
    /// Who may make it.
    pub(crate) access: Access,
    /// Whether it is refused while the server drains. What tells a router that we drain is not.
    pub(crate) work: bool,
}

/// The rule for a gRPC path, `/package.Service/Method`.
pub(crate) fn call(path: &str) -> Call {
    let (name, access, work) = match path {
        "/openlora.v1.Inference/Generate" => ("Inference.Generate", USE, true),
        "/openlora.v1.Inference/GenerateStream" => ("Inference.GenerateStream", USE, true),
        "/openlora.v1.Inference/CountTokens" => ("Inference.CountTokens", USE, true),
        "/openlora.v1.Adapters/Get" => ("Adapters.Get", USE, false),
        "/openlora.v1.Adapters/List" => ("Adapters.List", USE, false),
        "/openlora.v1.Adapters/Register" => ("Adapters.Register", CHANGE, true),
        "/openlora.v1.Adapters/Upload" => ("Adapters.Upload", CHANGE, true),
        "/openlora.v1.Adapters/Unregister" => ("Adapters.Unregister", CHANGE, true),
        "/openlora.v1.Adapters/SetAlias" => ("Adapters.SetAlias", CHANGE, true),
        "/openlora.v1.Adapters/Pin" => ("Adapters.Pin", CHANGE, true),
        "/openlora.v1.Adapters/GetQuota" => ("Adapters.GetQuota", CHANGE, false),
        "/openlora.v1.Adapters/SetQuota" => ("Adapters.SetQuota", ADMIN, true),
        "/openlora.v1.Server/GetInfo" => ("Server.GetInfo", Access::Key, false),
        "/openlora.v1.Server/GetModel" => ("Server.GetModel", Access::Key, false),
        // Their own accounts only, but for operators and administrators: `settlement.rs` looks.
        "/openlora.v1.Settlement/GetBalance" => ("Settlement.GetBalance", Access::Key, false),
        "/openlora.v1.Settlement/ListEntries" => ("Settlement.ListEntries", Access::Key, false),
        "/openlora.v1.Settlement/GetClaimProof" => ("Settlement.GetClaimProof", Access::Key, false),
        "/openlora.v1.Settlement/GetEpoch" => ("Settlement.GetEpoch", Access::Key, false),
        "/openlora.v1.Settlement/ListEpochs" => ("Settlement.ListEpochs", Access::Key, false),
        "/openlora.v1.Settlement/WatchEpochs" => ("Settlement.WatchEpochs", Access::Key, true),
        "/openlora.v1.Settlement/SealEpoch" => ("Settlement.SealEpoch", OPERATE, true),
        "/openlora.v1.Settlement/ProposeEpoch" => ("Settlement.ProposeEpoch", OPERATE, true),
        "/grpc.health.v1.Health/Check" | "/grpc.health.v1.Health/List" | "/grpc.health.v1.Health/Watch" => {
            ("Health", Access::Open, false)
        }
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        | "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo" => ("Reflection", Access::Key, false),
        _ => ("other", ADMIN, false),
    };
    Call { name, access, work }
}

/// Checks credentials for both doors.
#[derive(Clone, Debug)]
pub(crate) struct Authenticator {
    keys: Option<Arc<KeyStore>>,
}

impl Authenticator {
    pub(crate) fn new(auth: &Auth) -> Result<Self, ServerError> {
        let keys = match auth {
            Auth::Keys { path } => Some(Arc::new(KeyStore::open(path)?)),
            Auth::InsecureLoopback => None,
        };
        Ok(Self { keys })
    }

    /// The caller, where `access` lets them; `None` for an open door.
    ///
    /// # Errors
    /// [`ServerError::Unauthenticated`] and [`ServerError::Forbidden`].
    pub(crate) fn admit(&self, headers: &HeaderMap, access: Access, call: &str) -> Result<Option<Caller>, ServerError> {
        if access == Access::Open {
            return Ok(None);
        }
        let Some(keys) = &self.keys else {
            return Ok(Some(Caller { name: "local".into(), role: Role::Admin }));
        };
        let key = credential(headers)?;
        let record =
            keys.verify(key).ok_or(ServerError::Unauthenticated { reason: "the API key is not known here" })?;
        let caller = Caller { name: record.name.into(), role: record.role };
        match access {
            Access::Roles(roles) if !roles.contains(&caller.role) => {
                Err(ServerError::Forbidden { call: call.to_owned(), role: caller.role })
            }
            _ => Ok(Some(caller)),
        }
    }
}

/// The key in `authorization: Bearer …` or `x-api-key`. Exactly one: of two that differ, a proxy in front may have
/// looked at the other.
fn credential(headers: &HeaderMap) -> Result<&str, ServerError> {
    let refuse = |reason| ServerError::Unauthenticated { reason };
    let bearer = headers.get_all("authorization").iter().map(|value| (value, true));
    let plain = headers.get_all("x-api-key").iter().map(|value| (value, false));
    let mut values = bearer.chain(plain);
    let Some((value, is_bearer)) = values.next() else {
        return Err(refuse("send an API key as `authorization: Bearer olk_…`"));
    };
    if values.next().is_some() {
        return Err(refuse("more than one credential was sent"));
    }
    let text = value.to_str().ok().filter(|text| text.len() <= CREDENTIAL_BYTES_MAX);
    let text = text.ok_or(refuse("the credential is no API key"))?;
    if !is_bearer {
        return Ok(text.trim());
    }
    match text.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => Ok(key.trim()),
        _ => Err(refuse("the authorization header must be `Bearer olk_…`")),
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, value.parse().expect("header"));
        }
        map
    }

    #[test]
    fn every_call_of_the_interface_has_a_rule_of_its_own() {
        let set = prost_types::FileDescriptorSet::decode(openlora_proto::FILE_DESCRIPTOR_SET).expect("descriptors");
        let mut seen = 0;
        for file in &set.file {
            for service in file.service.iter().filter(|_| file.package() == "openlora.v1") {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    assert_eq!(call(&path).name, format!("{}.{}", service.name(), method.name()));
                    assert_ne!(call(&path).access, Access::Open, "{path}");
                    seen += 1;
                }
            }
        }
        assert!(seen >= 22, "{seen} methods");
        assert_eq!(call("/openlora.v2.New/Call").access, ADMIN);
    }

    #[test]
    fn credentials_are_read_from_either_header_but_not_from_two() {
        for good in [
            headers(&[("authorization", "Bearer olk_1")]),
            headers(&[("authorization", "bearer  olk_1 ")]),
            headers(&[("x-api-key", "olk_1")]),
        ] {
            assert_eq!(credential(&good).expect("one credential"), "olk_1");
        }
        let long = format!("Bearer {}", "x".repeat(10_000));
        for bad in [
            headers(&[]),
            headers(&[("authorization", "olk_1")]),
            headers(&[("authorization", "Basic olk_1")]),
            headers(&[("authorization", "Bearer olk_1"), ("x-api-key", "olk_2")]),
            headers(&[("x-api-key", "olk_1"), ("x-api-key", "olk_2")]),
            headers(&[("authorization", &long)]),
        ] {
            let error = credential(&bad).expect_err("refused");
            assert!(!error.to_string().contains("olk_1"), "{error}");
        }
    }

    #[test]
    fn a_role_reaches_its_own_calls_and_no_others() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("keys.json");
        let store = KeyStore::open(&path).expect("store");
        let roles = [Role::App, Role::Owner, Role::Contributor, Role::Operator, Role::Admin];
        let keys = roles.map(|role| store.create(&role.to_string(), role).expect("created"));
        let doors = Authenticator::new(&Auth::Keys { path }).expect("authenticator");
        let check = |access: Access, allowed: [bool; 5]| {
            for ((role, key), allowed) in roles.iter().zip(&keys).zip(allowed) {
                let sent = headers(&[("x-api-key", key.reveal())]);
                match doors.admit(&sent, access, "Call") {
                    Ok(caller) => assert!(allowed && caller.expect("caller").role == *role, "{role} {access:?}"),
                    Err(error) => assert!(!allowed && matches!(error, ServerError::Forbidden { .. }), "{error}"),
                }
            }
            let error = doors.admit(&headers(&[]), access, "Call").expect_err("no key");
            assert!(matches!(error, ServerError::Unauthenticated { .. }));
        };
        check(USE, [true, true, false, false, true]);
        check(CHANGE, [false, true, false, false, true]);
        check(OPERATE, [false, false, false, true, true]);
        check(ADMIN, [false, false, false, false, true]);
        check(Access::Key, [true; 5]);
        assert_eq!(doors.admit(&headers(&[]), Access::Open, "Health").expect("open"), None);
    }

    #[test]
    fn owners_stay_in_their_namespace() {
        let alias = |text: &str| Alias::parse("alias", text, &openlora_types::Limits::default()).expect(text);
        let owner = Caller { name: "acme".into(), role: Role::Owner };
        for good in ["acme", "acme/cwe", "acme/a/b"] {
            assert!(owner.check_namespace(&alias(good)).is_ok(), "{good}");
        }
        for bad in ["other/cwe", "acme2/cwe", "cwe", "Acme/cwe"] {
            assert!(matches!(owner.check_namespace(&alias(bad)), Err(ServerError::OutsideNamespace { .. })), "{bad}");
        }
        let admin = Caller { name: "root".into(), role: Role::Admin };
        assert!(admin.check_namespace(&alias("other/cwe")).is_ok());
    }
}
