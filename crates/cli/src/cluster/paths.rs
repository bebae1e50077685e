//! Where a cluster keeps its state, and its names.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// Name of the cluster when none is given.
pub const DEFAULT_NAME: &str = "mantlet";

/// The files of one cluster.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The cluster's name, a DNS label.
    pub name: String,
    /// Its state directory.
    pub dir: PathBuf,
}

impl Paths {
    /// The paths of a cluster: below `$MANTLET_STATE_DIR`, `$XDG_STATE_HOME/mantlet` or `~/.local/state/mantlet`.
    ///
    /// # Errors
    /// The name is no DNS label, or there is no home directory.
    pub fn of(name: &str) -> Result<Self> {
        let valid = !name.is_empty()
            && name.len() <= 40
            && name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !name.starts_with('-')
            && !name.ends_with('-');
        if !valid {
            bail!(
                "invalid cluster name {name:?}: it must be at most 40 lower case letters, digits and '-', \
                 beginning and ending with a letter or digit"
            );
        }
        let root = match (
            std::env::var_os("MANTLET_STATE_DIR"),
            std::env::var_os("XDG_STATE_HOME"),
        ) {
            (Some(dir), _) if !dir.is_empty() => PathBuf::from(dir),
            (_, Some(dir)) if !dir.is_empty() => PathBuf::from(dir).join("mantlet"),
            _ => {
                let home =
                    std::env::var_os("HOME").context("neither MANTLET_STATE_DIR, XDG_STATE_HOME nor HOME is set")?;
                PathBuf::from(home).join(".local/state/mantlet")
            }
        };
        let root = std::path::absolute(&root).with_context(|| format!("state directory {}", root.display()))?;
        Ok(Self {
            name: name.to_owned(),
            dir: root.join(name),
        })
    }

    /// Context, cluster and user name in kubeconfig files.
    pub fn context(&self) -> String {
        if self.name == DEFAULT_NAME {
            DEFAULT_NAME.to_owned()
        } else {
            format!("{DEFAULT_NAME}-{}", self.name)
        }
    }

    /// The object store.
    pub fn store(&self) -> PathBuf {
        self.dir.join("store.redb")
    }

    /// Keys and certificates.
    pub fn pki(&self) -> PathBuf {
        self.dir.join("pki")
    }

    /// The log of broker and cluster process.
    pub fn log(&self) -> PathBuf {
        self.dir.join("cluster.log")
    }

    /// Where the broker answers status and stop.
    pub fn broker_socket(&self) -> PathBuf {
        self.dir.join("broker.sock")
    }

    /// Held by the broker as long as it lives.
    pub fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }

    fn settings_file(&self) -> PathBuf {
        self.dir.join("settings.json")
    }

    /// What the last `up` has decided.
    ///
    /// # Errors
    /// The file is there but cannot be read or understood.
    pub fn settings(&self) -> Result<Settings> {
        let path = self.settings_file();
        match std::fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged; remove it", path.display()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Settings::default()),
            Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }

    /// Keeps the settings.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, settings: &Settings) -> Result<()> {
        write_private(&self.settings_file(), &serde_json::to_vec_pretty(settings)?)
    }
}

/// What one `up` tells the next, and `down`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Settings {
    /// Port of the API on the host's loopback address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The kubeconfig file that holds the context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<PathBuf>,
    /// The context that was current before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub former_context: Option<String>,
}

/// Replaces a file in one step, readable by its owner only.
///
/// # Errors
/// The directory cannot be written to.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let dir = path.parent().context("a file needs a directory")?;
    let mut file = tempfile::NamedTempFile::new_in(dir).with_context(|| format!("writing to {}", dir.display()))?;
    file.write_all(bytes)
        .with_context(|| format!("writing {}", path.display()))?;
    file.as_file().sync_all()?;
    // NamedTempFile is created with mode 0600.
    file.persist(path)
        .with_context(|| format!("replacing {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_labels() {
        for bad in ["", "A", "a_b", "-a", "a-", "a/b", "../x", &"a".repeat(41)] {
            assert!(Paths::of(bad).is_err(), "{bad:?}");
        }
        let paths = Paths::of("lab-1").expect("a valid name");
        assert_eq!(paths.context(), "mantlet-lab-1");
        assert_eq!(Paths::of("mantlet").expect("valid").context(), "mantlet");
    }
}
