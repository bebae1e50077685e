//! Adds, removes and selects a context in a kubeconfig file, as kind does; everything else in the file is kept.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use base64::Engine;
use serde_json::{Map, Value, json};

use super::paths::write_private;

/// Largest kubeconfig that is read.
const MAX_SIZE: u64 = 8 << 20;
/// How long to wait for another program's lock on the file.
const LOCK_LIMIT: Duration = Duration::from_secs(5);

/// The file that kubectl would use: the first of `$KUBECONFIG`, or `~/.kube/config`.
///
/// # Errors
/// Neither variable nor home directory is set.
pub fn default_path() -> Result<PathBuf> {
    if let Some(list) = std::env::var_os("KUBECONFIG")
        && let Some(first) = std::env::split_paths(&list).find(|path| !path.as_os_str().is_empty())
    {
        return Ok(std::path::absolute(first)?);
    }
    let home = std::env::var_os("HOME").context("neither KUBECONFIG nor HOME is set")?;
    Ok(PathBuf::from(home).join(".kube/config"))
}

/// How to reach a cluster.
pub struct Access<'a> {
    /// Name of the context, the cluster and the user.
    pub context: &'a str,
    /// `https://127.0.0.1:PORT`.
    pub server: &'a str,
    /// CA certificate, PEM.
    pub ca_cert: &'a str,
    /// Client certificate, PEM.
    pub cert: &'a str,
    /// Client key, PEM.
    pub key: &'a str,
}

/// Checks that the file, if it is there, can be edited.
///
/// # Errors
/// It cannot be read or is no kubeconfig.
pub fn check(path: &Path) -> Result<()> {
    read(path).map(drop)
}

/// Adds or replaces the context and makes it current; the context that was current before is the result.
///
/// # Errors
/// The file cannot be read, understood or written.
pub fn add(path: &Path, access: &Access<'_>) -> Result<Option<String>> {
    edit(path, |config| {
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        set(
            config,
            "clusters",
            access.context,
            "cluster",
            json!({
            "certificate-authority-data": encode(access.ca_cert), "server": access.server}),
        )?;
        set(
            config,
            "users",
            access.context,
            "user",
            json!({
            "client-certificate-data": encode(access.cert), "client-key-data": encode(access.key)}),
        )?;
        set(
            config,
            "contexts",
            access.context,
            "context",
            json!({"cluster": access.context, "user": access.context}),
        )?;
        let before = config.get("current-context").and_then(Value::as_str).map(str::to_owned);
        config.insert("current-context".to_owned(), json!(access.context));
        config.entry("apiVersion").or_insert_with(|| json!("v1"));
        config.entry("kind").or_insert_with(|| json!("Config"));
        Ok(before.filter(|before| !before.is_empty() && before != access.context))
    })
}

/// Removes the context; when it is current, `former` becomes current again if it still exists.
///
/// # Errors
/// The file cannot be read, understood or written.
pub fn remove(path: &Path, context: &str, former: Option<&str>) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    edit(path, |config| {
        for list in ["clusters", "users", "contexts"] {
            if let Some(Value::Array(entries)) = config.get_mut(list) {
                entries.retain(|entry| entry.get("name").and_then(Value::as_str) != Some(context));
            }
        }
        if config.get("current-context").and_then(Value::as_str) == Some(context) {
            let exists = |name: &&str| {
                let contexts = config.get("contexts").and_then(Value::as_array);
                contexts
                    .into_iter()
                    .flatten()
                    .any(|entry| entry.get("name").and_then(Value::as_str) == Some(*name))
            };
            let next = former.filter(exists).unwrap_or_default().to_owned();
            config.insert("current-context".to_owned(), json!(next));
        }
        Ok(())
    })
}

fn set(config: &mut Map<String, Value>, list: &str, name: &str, field: &str, value: Value) -> Result<()> {
    let slot = config.entry(list.to_owned()).or_insert(Value::Null);
    if slot.is_null() {
        *slot = json!([]);
    }
    let Value::Array(entries) = slot else {
        bail!("{list} is not a list");
    };
    let known = entries
        .iter_mut()
        .find(|entry| entry.get("name").and_then(Value::as_str) == Some(name));
    match known {
        // A namespace that the user has set for the context stays.
        Some(Value::Object(entry)) => match (entry.get_mut(field), value) {
            (Some(Value::Object(known)), Value::Object(value)) => known.extend(value),
            (_, value) => {
                entry.insert(field.to_owned(), value);
            }
        },
        _ => entries.push(json!({field: value, "name": name})),
    }
    Ok(())
}

fn read(path: &Path) -> Result<Map<String, Value>> {
    let text = match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(error) => return Err(error).with_context(|| format!("kubeconfig {}", path.display())),
        Ok(metadata) if metadata.len() > MAX_SIZE => bail!("kubeconfig {} is larger than 8 MB", path.display()),
        Ok(_) => std::fs::read_to_string(path).with_context(|| format!("kubeconfig {}", path.display()))?,
    };
    if text.trim().is_empty() {
        return Ok(Map::new());
    }
    let value: Value = serde_saphyr::from_str(&text).with_context(|| {
        format!(
            "kubeconfig {} is not valid YAML; repair it or pass --kubeconfig",
            path.display()
        )
    })?;
    match value {
        Value::Object(map) => Ok(map),
        Value::Null => Ok(Map::new()),
        _ => bail!(
            "kubeconfig {} is not a kubeconfig; repair it or pass --kubeconfig",
            path.display()
        ),
    }
}

/// One locked read-modify-write. The lock file is the one that kubectl uses.
fn edit<T>(path: &Path, change: impl FnOnce(&mut Map<String, Value>) -> Result<T>) -> Result<T> {
    // A link stays a link: its target is replaced.
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let dir = path.parent().context("the kubeconfig has no directory")?;
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let _lock = Lock::take(&path)?;
    let mut config = read(&path)?;
    let result = change(&mut config).with_context(|| format!("kubeconfig {}", path.display()))?;
    let text = serde_saphyr::to_string(&config)?;
    write_private(&path, text.as_bytes())?;
    Ok(result)
}

struct Lock(PathBuf);

impl Lock {
    fn take(path: &Path) -> Result<Self> {
        let mut name = path.as_os_str().to_owned();
        name.push(".lock");
        let lock = PathBuf::from(name);
        let start = Instant::now();
        loop {
            match std::fs::OpenOptions::new().write(true).create_new(true).open(&lock) {
                Ok(_) => return Ok(Self(lock)),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && start.elapsed() < LOCK_LIMIT => {
                    // Another program's lock is a file without any way to wait for its end.
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    bail!(
                        "{} is there: another program edits the kubeconfig, or has died doing so; remove the file",
                        lock.display()
                    )
                }
                Err(error) => return Err(error).with_context(|| format!("making {}", lock.display())),
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXISTING: &str = "apiVersion: v1\nkind: Config\npreferences: {}\ncurrent-context: prod\n\
        clusters:\n- name: prod\n  cluster:\n    server: https://prod:6443\n    extra: kept\n\
        contexts:\n- name: prod\n  context:\n    cluster: prod\n    user: prod\n    namespace: web\n\
        users:\n- name: prod\n  user:\n    token: \"0123\"\n    exec:\n      command: yes-man\n      args: [\"a\", \"true\"]\n";

    fn access(server: &str) -> Access<'_> {
        Access {
            context: "mantlet",
            server,
            ca_cert: "ca",
            cert: "cert",
            key: "key",
        }
    }

    fn kubectl(path: &Path, args: &[&str]) -> String {
        let output = std::process::Command::new("kubectl")
            .args(args)
            .env("KUBECONFIG", path)
            .output()
            .expect("kubectl is needed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    #[test]
    fn the_rest_of_the_file_is_kept_and_the_former_context_restored() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("config");
        std::fs::write(&path, EXISTING).expect("writable");
        let before: Value = serde_saphyr::from_str(EXISTING).expect("YAML");
        let former = add(&path, &access("https://127.0.0.1:6443")).expect("added");
        assert_eq!(former.as_deref(), Some("prod"));
        assert_eq!(kubectl(&path, &["config", "current-context"]), "mantlet");
        assert_eq!(
            kubectl(
                &path,
                &[
                    "config",
                    "view",
                    "--minify",
                    "-o",
                    "jsonpath={.clusters[0].cluster.server}"
                ]
            ),
            "https://127.0.0.1:6443"
        );
        // A second `up` on another port replaces, and does not remember itself as the former context.
        assert_eq!(add(&path, &access("https://127.0.0.1:7000")).expect("replaced"), None);
        assert_eq!(
            kubectl(&path, &["config", "get-contexts", "-o", "name"]),
            "mantlet\nprod"
        );
        remove(&path, "mantlet", Some("prod")).expect("removed");
        let after: Value = serde_saphyr::from_str(&std::fs::read_to_string(&path).expect("readable")).expect("YAML");
        assert_eq!(before, after);
        assert_eq!(kubectl(&path, &["config", "current-context"]), "prod");
    }

    #[test]
    fn a_context_chosen_meanwhile_stays_current() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("new/config");
        add(&path, &access("https://127.0.0.1:6443")).expect("added");
        kubectl(&path, &["config", "set-context", "other", "--cluster=x", "--user=y"]);
        kubectl(&path, &["config", "use-context", "other"]);
        remove(&path, "mantlet", Some("prod")).expect("removed");
        assert_eq!(kubectl(&path, &["config", "current-context"]), "other");
    }

    #[test]
    fn a_broken_file_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("config");
        for broken in ["a: [", "- list", "clusters: text"] {
            std::fs::write(&path, broken).expect("writable");
            assert!(add(&path, &access("https://127.0.0.1:6443")).is_err(), "{broken}");
            assert_eq!(std::fs::read_to_string(&path).expect("readable"), broken);
        }
    }
}
