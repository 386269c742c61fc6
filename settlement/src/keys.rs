//! Keys that sign transactions: from an encrypted keystore file, or held by AWS KMS (feature `aws-kms`). Never from
//! arguments or the environment, which other processes can read; never shown.

use std::{fmt, fs, io::Read as _, os::unix::fs::PermissionsExt as _, path::Path};

use alloy::{
    primitives::{Address, B256, Signature},
    signers::{
        Signer as _,
        k256::elliptic_curve::rand_core::OsRng,
        local::{LocalSignerError, PrivateKeySigner},
    },
};
use zeroize::Zeroizing;

/// Bytes of a keystore or password file.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Permissions of others than the owner.
const OTHERS: u32 = 0o077;

/// Why there is no key. Holds neither key nor password.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// A file that cannot be read or written.
    #[error("could not use {file}: {source}")]
    File {
        /// Its path.
        file: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A password that others can read.
    #[error("{file} holds a password and its mode {mode:o} lets others read it; run: chmod 600 {file}")]
    ReadableByOthers {
        /// Its path.
        file: String,
        /// Its permissions.
        mode: u32,
    },
    /// A password of no bytes protects nothing.
    #[error("the password is empty")]
    EmptyPassword,
    /// The password is another one.
    #[error("the password does not open {file}")]
    WrongPassword {
        /// The keystore's path.
        file: String,
    },
    /// No Web3 Secret Storage.
    #[error("{file} is no encrypted keystore; make one with `openlora chain key`")]
    NoKeystore {
        /// Its path.
        file: String,
    },
    /// AWS KMS gave no such key.
    #[cfg(feature = "aws-kms")]
    #[error(
        "could not use the key {key} of AWS KMS: {why}; it must be of the kind ECC_SECG_P256K1, and AWS_REGION and credentials set"
    )]
    Kms {
        /// Its id.
        key: String,
        /// The service's answer.
        why: String,
    },
    /// The key's holder did not sign.
    #[error("could not sign with the key of {account}: {why}")]
    NotSigned {
        /// The key's account.
        account: Address,
        /// The holder's answer.
        why: String,
    },
}

/// What opens a keystore. Wiped from memory when dropped, and never shown.
pub struct Password(Zeroizing<String>);

impl Password {
    /// One that a person typed.
    ///
    /// # Errors
    /// [`KeyError::EmptyPassword`].
    pub fn new(typed: String) -> Result<Self, KeyError> {
        let typed = Zeroizing::new(typed);
        if typed.is_empty() { Err(KeyError::EmptyPassword) } else { Ok(Self(typed)) }
    }

    /// The first line of a file that its owner alone may read.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn read(file: &Path) -> Result<Self, KeyError> {
        let (text, mode) = read(file)?;
        if mode & OTHERS != 0 {
            return Err(KeyError::ReadableByOthers { file: file.display().to_string(), mode: mode & 0o777 });
        }
        Self::new(text.lines().next().unwrap_or_default().to_owned())
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(…)")
    }
}

/// A file's text and permissions, both of the same open file.
fn read(file: &Path) -> Result<(Zeroizing<String>, u32), KeyError> {
    let failed = |source| KeyError::File { file: file.display().to_string(), source };
    let opened = fs::File::open(file).map_err(failed)?;
    let mode = opened.metadata().map_err(failed)?.permissions().mode();
    let mut text = Zeroizing::new(String::new());
    opened.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    Ok((text, mode))
}

/// An error with what caused it: the SDK's own text stops at "service error".
#[cfg(feature = "aws-kms")]
fn in_full(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// A key that signs. Shown as its account.
#[derive(Clone)]
#[non_exhaustive]
pub enum Signer {
    /// A key in this process's memory.
    Local(PrivateKeySigner),
    /// A key that never leaves AWS KMS.
    #[cfg(feature = "aws-kms")]
    Aws(alloy::signers::aws::AwsSigner),
}

impl Signer {
    /// Opens an encrypted keystore (Web3 Secret Storage, as geth, Foundry and others write it). Takes as long as its
    /// author wanted guesses to take, a second perhaps: not for async code.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn open(keystore: &Path, password: &Password) -> Result<Self, KeyError> {
        // Read here first: a missing file and a large one are told apart from a broken one.
        let file = keystore.display().to_string();
        read(keystore)?;
        match PrivateKeySigner::decrypt_keystore(keystore, password.0.as_bytes()) {
            Ok(key) => Ok(Self::Local(key)),
            Err(LocalSignerError::EthKeystoreError(error)) if error.to_string() == "Mac Mismatch" => {
                Err(KeyError::WrongPassword { file })
            }
            Err(_) => Err(KeyError::NoKeystore { file }),
        }
    }

    /// Makes a key and keeps it in a new encrypted keystore that its owner alone may read.
    ///
    /// # Errors
    /// [`KeyError`], also where the file is there already.
    pub fn create(keystore: &Path, password: &Password) -> Result<Self, KeyError> {
        let failed = |source| KeyError::File { file: keystore.display().to_string(), source };
        let name = keystore.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| failed(std::io::ErrorKind::InvalidFilename.into()))?;
        // Claims the name, so that no other key is written over.
        let claimed = fs::OpenOptions::new().write(true).create_new(true).open(keystore).map_err(failed)?;
        claimed.set_permissions(fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let folder = keystore.parent().unwrap_or(Path::new("."));
        match PrivateKeySigner::new_keystore(folder, &mut OsRng, password.0.as_bytes(), Some(name)) {
            Ok((key, _)) => claimed.sync_all().map(|()| Self::Local(key)).map_err(failed),
            Err(error) => Err(failed(std::io::Error::other(error.to_string()))),
        }
    }

    /// A key of AWS KMS, by id, ARN or alias: of the kind `ECC_SECG_P256K1`, for signing. Where it is and who asks come from where
    /// AWS's own tools have it: `AWS_REGION`, `AWS_PROFILE`, `AWS_ENDPOINT_URL`, an instance's role.
    ///
    /// # Errors
    /// [`KeyError::Kms`].
    #[cfg(feature = "aws-kms")]
    pub async fn kms(key: &str) -> Result<Self, KeyError> {
        use alloy::signers::aws::{AwsSigner, aws_sdk_kms::Client};
        use aws_smithy_http_client::{Builder, tls};

        let tls = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring);
        let https = Builder::new().tls_provider(tls).build_https();
        let config = aws_config::defaults(aws_config::BehaviorVersion::latest()).http_client(https).load().await;
        let opened = AwsSigner::new(Client::new(&config), key.to_owned(), None).await;
        opened.map(Self::Aws).map_err(|error| KeyError::Kms { key: key.to_owned(), why: in_full(&error) })
    }

    /// The account that the key pays for.
    #[must_use]
    pub fn address(&self) -> Address {
        match self {
            Self::Local(key) => key.address(),
            #[cfg(feature = "aws-kms")]
            Self::Aws(key) => key.address(),
        }
    }

    /// Signs a transaction's hash.
    ///
    /// # Errors
    /// [`KeyError::NotSigned`].
    pub(crate) async fn sign(&self, hash: &B256) -> Result<Signature, KeyError> {
        let signed = match self {
            Self::Local(key) => key.sign_hash(hash).await,
            #[cfg(feature = "aws-kms")]
            Self::Aws(key) => key.sign_hash(hash).await,
        };
        signed.map_err(|error| KeyError::NotSigned { account: self.address(), why: error.to_string() })
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({})", self.address())
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const SECRET: &str = "correct horse battery";

    fn password() -> Password {
        Password::new(SECRET.into()).expect("not empty")
    }

    #[test]
    fn a_key_is_kept_encrypted_and_opened_by_its_password_alone() {
        let dir = TempDir::new().expect("a temporary folder");
        let file = dir.path().join("operator.json");
        let made = Signer::create(&file, &password()).expect("made");
        let Signer::Local(key) = &made;
        let text = fs::read_to_string(&file).expect("written");
        assert!(!text.contains(&alloy::hex::encode(key.to_bytes())) && !text.contains(SECRET));
        assert_eq!(fs::metadata(&file).expect("there").permissions().mode() & 0o777, 0o600);
        assert_eq!(Signer::open(&file, &password()).expect("opened").address(), made.address());
        let other = Password::new("correct horse batterz".into()).expect("not empty");
        assert!(matches!(Signer::open(&file, &other), Err(KeyError::WrongPassword { .. })));
        assert!(matches!(Signer::create(&file, &password()), Err(KeyError::File { .. })), "written over");
        assert_eq!(Signer::open(&file, &password()).expect("still there").address(), made.address());
    }

    /// The test vector with PBKDF2 of the Web3 Secret Storage Definition.
    #[test]
    fn a_keystore_of_another_program_is_opened() {
        let dir = TempDir::new().expect("a temporary folder");
        let file = dir.path().join("v.json");
        let text = r#"{"crypto":{"cipher":"aes-128-ctr","cipherparams":{"iv":"6087dab2f9fdbbfaddc31a909735c1e6"},
            "ciphertext":"5318b4d5bcd28de64ee5559e671353e16f075ecae9f99c7a79a38af5f869aa46","kdf":"pbkdf2",
            "kdfparams":{"c":262144,"dklen":32,"prf":"hmac-sha256",
            "salt":"ae3cd4e7013836a3df6bd7241b12db061dbe2c6785853cce422d148a624ce0bd"},
            "mac":"517ead924a9d0dc3124507e3393d175ce3ff7c1e96529c6c555ce9e51205e9b2"},
            "id":"3198bc9c-6672-5ab3-d995-4942343ae5b6","version":3}"#;
        fs::write(&file, text).expect("written");
        let Signer::Local(key) =
            Signer::open(&file, &Password::new("testpassword".into()).expect("text")).expect("opened");
        let secret = "7a28b5ba57c53603b0b07b56bba752f7784bf506fa95edc395f5cf6c7514fe9d";
        assert_eq!(alloy::hex::encode(key.to_bytes()), secret);
    }

    #[test]
    fn a_password_file_that_others_can_read_is_refused() {
        let dir = TempDir::new().expect("a temporary folder");
        let file = dir.path().join("password");
        fs::write(&file, format!("{SECRET}\nnotes\n")).expect("written");
        for (mode, fine) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false)] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).expect("set");
            match Password::read(&file) {
                Ok(password) => assert!(fine && *password.0 == SECRET, "{mode:o}"),
                Err(error) => assert!(!fine && error.to_string().contains("chmod 600"), "{mode:o}: {error}"),
            }
        }
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("set");
        fs::write(&file, "\n").expect("written");
        assert!(matches!(Password::read(&file), Err(KeyError::EmptyPassword)));
        assert!(matches!(Password::read(&dir.path().join("none")), Err(KeyError::File { .. })));
    }

    #[test]
    fn what_is_no_keystore_is_refused_without_being_repeated() {
        let dir = TempDir::new().expect("a temporary folder");
        let file = dir.path().join("key");
        let key = "7a28b5ba57c53603b0b07b56bba752f7784bf506fa95edc395f5cf6c7514fe9d";
        for text in [key, "", "{}", &"[".repeat(1 << 20)] {
            fs::write(&file, text).expect("written");
            let error = Signer::open(&file, &password()).expect_err("no keystore");
            assert!(matches!(error, KeyError::NoKeystore { .. }));
            assert!(!format!("{error} {error:?}").contains(key));
        }
    }

    #[test]
    fn neither_key_nor_password_is_ever_shown() {
        let key = PrivateKeySigner::from_bytes(&B256::repeat_byte(0x5A)).expect("a key");
        let shown = format!("{:?} {:?}", Signer::Local(key.clone()), password());
        assert_eq!(shown, format!("Signer({}) Password(…)", key.address()));
    }
}
