//! A pod's volumes on the node: made before its first container, refreshed while it runs, removed with it.
//!
//! Called by the node agent. Secrets, tokens and configuration live on a tmpfs, written atomically: readers see the old or
//! the new set of files, never a mixture (a link `..data` is switched, as Kubernetes does).

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, ConfigMapProjection, DownwardAPIProjection, DownwardAPIVolumeFile, KeyToPath, Pod, Secret,
    SecretProjection, ServiceAccount, ServiceAccountTokenProjection, Volume, VolumeProjection,
};
use kube::api::{Api, PostParams};

use crate::kubelet::fields::{self, PodFacts};
use crate::sandbox;

/// Files of one volume: path → content and mode.
type Files = BTreeMap<String, (Vec<u8>, u32)>;

/// A volume of generated files may hold this many bytes.
const MAX_BYTES: usize = 4 << 20;
/// The link that is switched.
const DATA: &str = "..data";

/// Why a volume is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    /// An object that it is made from does not exist (yet).
    #[error("MountVolume.SetUp failed for volume {volume:?} : {message}")]
    Source {
        /// The volume.
        volume: String,
        /// What is missing.
        message: String,
    },
    /// A kind of volume that the node does not have.
    #[error(
        "volume {volume:?}: {kind} is not supported by this node; use emptyDir, configMap, secret, projected or downwardAPI"
    )]
    Unsupported {
        /// The volume.
        volume: String,
        /// Its kind.
        kind: &'static str,
    },
    /// The file system refused.
    #[error("volume {volume:?}: {source}")]
    Io {
        /// The volume.
        volume: String,
        /// The error.
        source: std::io::Error,
    },
}

/// The volumes of one pod.
#[derive(Debug)]
pub(crate) struct Volumes {
    dir: PathBuf,
    /// The tmpfs is mounted by this process; that of an earlier one went away with its mount namespace.
    mounted: bool,
    fs_group: Option<u32>,
    /// When each projected token is to be replaced.
    token_due: BTreeMap<(String, String), Instant>,
    tokens: BTreeMap<(String, String), String>,
    written: BTreeMap<String, Files>,
}

impl Volumes {
    /// For a pod with its directory on the node.
    #[must_use]
    pub(crate) fn new(pod_dir: &Path, pod: &Pod) -> Self {
        let fs_group = pod
            .spec
            .as_ref()
            .and_then(|s| s.security_context.as_ref())
            .and_then(|s| s.fs_group);
        Self {
            dir: pod_dir.to_owned(),
            mounted: false,
            fs_group: fs_group.and_then(|id| u32::try_from(id).ok()),
            token_due: BTreeMap::new(),
            tokens: BTreeMap::new(),
            written: BTreeMap::new(),
        }
    }

    fn memory_dir(&self) -> PathBuf {
        self.dir.join("memory")
    }

    /// Where a volume's content is.
    #[must_use]
    pub(crate) fn path(&self, volume: &Volume) -> PathBuf {
        let on_disk = volume
            .empty_dir
            .as_ref()
            .is_some_and(|e| e.medium.as_deref() != Some("Memory"));
        if on_disk {
            self.dir.join("volumes").join(&volume.name)
        } else {
            self.memory_dir().join(&volume.name)
        }
    }

    /// Makes all volumes. May be called again after an error.
    ///
    /// # Errors
    /// [`VolumeError`]; those of missing objects may pass with time.
    pub(crate) async fn set_up(
        &mut self,
        client: &kube::Client,
        pod: &Pod,
        facts: &PodFacts,
    ) -> Result<(), VolumeError> {
        let memory = self.memory_dir();
        let io = |source| VolumeError::Io {
            volume: "memory".into(),
            source,
        };
        if !self.mounted {
            std::fs::create_dir_all(&memory).map_err(io)?;
            sandbox::mount_tmpfs(&memory, "mode=0755,size=64m")
                .map_err(|e| io(std::io::Error::other(e.to_string())))?;
            self.mounted = true;
        }
        for volume in pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()) {
            if volume.empty_dir.is_some() {
                self.make_empty_dir(volume).map_err(|source| VolumeError::Io {
                    volume: volume.name.clone(),
                    source,
                })?;
            } else {
                self.write_files(client, pod, facts, volume).await?;
            }
        }
        Ok(())
    }

    /// Writes anew what has changed in the API, and tokens before they expire.
    ///
    /// # Errors
    /// [`VolumeError`]; the files stay as they were.
    pub(crate) async fn refresh(
        &mut self,
        client: &kube::Client,
        pod: &Pod,
        facts: &PodFacts,
    ) -> Result<(), VolumeError> {
        for volume in pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()) {
            if volume.empty_dir.is_none() {
                self.write_files(client, pod, facts, volume).await?;
            }
        }
        Ok(())
    }

    /// Unmounts and removes everything.
    pub(crate) fn tear_down(&self) {
        let memory = self.memory_dir();
        for entry in std::fs::read_dir(&memory).into_iter().flatten().flatten() {
            let _ = rustix::mount::unmount(entry.path(), rustix::mount::UnmountFlags::DETACH);
        }
        let _ = rustix::mount::unmount(&memory, rustix::mount::UnmountFlags::DETACH);
    }

    fn make_empty_dir(&self, volume: &Volume) -> std::io::Result<()> {
        let source = volume.empty_dir.clone().unwrap_or_default();
        let path = self.path(volume);
        if path.exists() {
            return Ok(());
        }
        std::fs::create_dir_all(&path)?;
        if source.medium.as_deref() == Some("Memory") {
            let limit = source
                .size_limit
                .as_ref()
                .and_then(|q| fields::quantity_milli(&q.0))
                .map_or(256 << 20, |m| m / 1000);
            sandbox::mount_tmpfs(&path, &format!("mode=0777,size={limit}"))
                .map_err(|e| std::io::Error::other(e.to_string()))?;
        }
        let mut mode = 0o777;
        if let Some(group) = self.fs_group {
            chown(&path, None, Some(group))?;
            mode = 0o2777;
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))
    }

    async fn write_files(
        &mut self,
        client: &kube::Client,
        pod: &Pod,
        facts: &PodFacts,
        volume: &Volume,
    ) -> Result<(), VolumeError> {
        let files = self.collect(client, pod, facts, volume).await?;
        if self.written.get(&volume.name) == Some(&files) {
            return Ok(());
        }
        let path = self.path(volume);
        write_atomically(&path, &files, self.fs_group).map_err(|source| VolumeError::Io {
            volume: volume.name.clone(),
            source,
        })?;
        self.written.insert(volume.name.clone(), files);
        Ok(())
    }

    async fn collect(
        &mut self,
        client: &kube::Client,
        pod: &Pod,
        facts: &PodFacts,
        volume: &Volume,
    ) -> Result<Files, VolumeError> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let name = volume.name.as_str();
        let missing = |message: String| VolumeError::Source {
            volume: name.to_owned(),
            message,
        };
        let (parts, default_mode) = projections(volume).ok_or_else(|| VolumeError::Unsupported {
            volume: name.into(),
            kind: unsupported_kind(volume),
        })?;
        let mode = mode(default_mode);
        let mut files = Files::new();
        for part in parts {
            if let Some(source) = &part.config_map {
                let data = config_map(client, namespace, &source.name, source.optional)
                    .await
                    .map_err(missing)?;
                let items = source.items.as_deref();
                select(&mut files, data, items, mode, source.optional, &source.name).map_err(missing)?;
            }
            if let Some(source) = &part.secret {
                let data = secret(client, namespace, &source.name, source.optional)
                    .await
                    .map_err(missing)?;
                let items = source.items.as_deref();
                select(&mut files, data, items, mode, source.optional, &source.name).map_err(missing)?;
            }
            if let Some(source) = &part.downward_api {
                downward(&mut files, pod, facts, source.items.as_deref(), mode).map_err(missing)?;
            }
            if let Some(source) = &part.service_account_token {
                let token = self.token(client, pod, name, source).await.map_err(missing)?;
                files.insert(safe_path(&source.path).map_err(missing)?, (token.into_bytes(), mode));
            }
            if part.cluster_trust_bundle.is_some() || part.pod_certificate.is_some() {
                return Err(VolumeError::Unsupported {
                    volume: name.into(),
                    kind: "this projected source",
                });
            }
        }
        if files.values().map(|(content, _)| content.len()).sum::<usize>() > MAX_BYTES {
            return Err(missing(format!("its files are larger than {MAX_BYTES} bytes")));
        }
        Ok(files)
    }

    /// A token for the pod's service account, bound to the pod; a new one once 80 % of its life has passed.
    async fn token(
        &mut self,
        client: &kube::Client,
        pod: &Pod,
        volume: &str,
        source: &ServiceAccountTokenProjection,
    ) -> Result<String, String> {
        let key = (volume.to_owned(), source.path.clone());
        if let (Some(due), Some(token)) = (self.token_due.get(&key), self.tokens.get(&key))
            && Instant::now() < *due
        {
            return Ok(token.clone());
        }
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let account = pod
            .spec
            .as_ref()
            .and_then(|s| s.service_account_name.as_deref())
            .unwrap_or("default");
        let lifetime = source.expiration_seconds.unwrap_or(3600).max(600);
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: source.audience.clone().map(|audience| vec![audience]),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Pod".into()),
                    name: pod.metadata.name.clone(),
                    uid: pod.metadata.uid.clone(),
                }),
                expiration_seconds: Some(lifetime),
                ..TokenRequestSpec::default()
            }),
            ..TokenRequest::default()
        };
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
        let answer = accounts
            .create_token_request(account, &PostParams::default(), &request)
            .await
            .map_err(|error| format!("failed to fetch token: {}", explain(&error)))?;
        let token = answer
            .status
            .and_then(|s| s.token)
            .ok_or("the API server returned no token")?;
        let due = Instant::now() + Duration::from_secs(lifetime.unsigned_abs() * 4 / 5);
        self.token_due.insert(key.clone(), due);
        self.tokens.insert(key, token.clone());
        Ok(token)
    }
}

/// The message of an API error without its debug form.
pub(crate) fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// What a volume of files is made from, and their mode: a plain ConfigMap, Secret or downward volume is a projection of one source.
fn projections(volume: &Volume) -> Option<(Vec<VolumeProjection>, Option<i32>)> {
    let only = |part: VolumeProjection, mode: Option<i32>| Some((vec![part], mode));
    if let Some(source) = &volume.config_map {
        let part = VolumeProjection {
            config_map: Some(ConfigMapProjection {
                items: source.items.clone(),
                name: source.name.clone(),
                optional: source.optional,
            }),
            ..VolumeProjection::default()
        };
        only(part, source.default_mode)
    } else if let Some(source) = &volume.secret {
        let part = VolumeProjection {
            secret: Some(SecretProjection {
                items: source.items.clone(),
                name: source.secret_name.clone().unwrap_or_default(),
                optional: source.optional,
            }),
            ..VolumeProjection::default()
        };
        only(part, source.default_mode)
    } else if let Some(source) = &volume.downward_api {
        let part = VolumeProjection {
            downward_api: Some(DownwardAPIProjection {
                items: source.items.clone(),
            }),
            ..VolumeProjection::default()
        };
        only(part, source.default_mode)
    } else {
        let source = volume.projected.as_ref()?;
        Some((source.sources.clone().unwrap_or_default(), source.default_mode))
    }
}

fn unsupported_kind(volume: &Volume) -> &'static str {
    if volume.host_path.is_some() {
        "hostPath"
    } else if volume.persistent_volume_claim.is_some() {
        "persistentVolumeClaim"
    } else if volume.csi.is_some() {
        "csi"
    } else {
        "this kind of volume"
    }
}

fn mode(mode: Option<i32>) -> u32 {
    mode.and_then(|m| u32::try_from(m).ok()).unwrap_or(0o644) & 0o7777
}

type Data = Option<BTreeMap<String, Vec<u8>>>;

/// A ConfigMap's data; `None` when it does not exist and need not.
pub(crate) async fn config_map(
    client: &kube::Client,
    namespace: &str,
    name: &str,
    optional: Option<bool>,
) -> Result<Data, String> {
    let found = Api::<ConfigMap>::namespaced(client.clone(), namespace)
        .get_opt(name)
        .await
        .map_err(|e| explain(&e))?;
    match found {
        Some(map) => {
            let text = map
                .data
                .unwrap_or_default()
                .into_iter()
                .map(|(key, value)| (key, value.into_bytes()));
            let binary = map
                .binary_data
                .unwrap_or_default()
                .into_iter()
                .map(|(key, value)| (key, value.0));
            Ok(Some(text.chain(binary).collect()))
        }
        None if optional == Some(true) => Ok(None),
        None => Err(format!("configmap {name:?} not found")),
    }
}

/// A Secret's data; `None` when it does not exist and need not.
pub(crate) async fn secret(
    client: &kube::Client,
    namespace: &str,
    name: &str,
    optional: Option<bool>,
) -> Result<Data, String> {
    let found = Api::<Secret>::namespaced(client.clone(), namespace)
        .get_opt(name)
        .await
        .map_err(|e| explain(&e))?;
    match found {
        Some(secret) => Ok(Some(
            secret
                .data
                .unwrap_or_default()
                .into_iter()
                .map(|(key, value)| (key, value.0))
                .collect(),
        )),
        None if optional == Some(true) => Ok(None),
        None => Err(format!("secret {name:?} not found")),
    }
}

fn select(
    files: &mut Files,
    data: Data,
    items: Option<&[KeyToPath]>,
    default_mode: u32,
    optional: Option<bool>,
    name: &str,
) -> Result<(), String> {
    let Some(data) = data else { return Ok(()) };
    match items.filter(|items| !items.is_empty()) {
        None => {
            for (key, value) in data {
                files.insert(safe_path(&key)?, (value, default_mode));
            }
        }
        Some(items) => {
            for item in items {
                match data.get(&item.key) {
                    Some(value) => {
                        let mode = item.mode.map_or(default_mode, |m| mode(Some(m)));
                        files.insert(safe_path(&item.path)?, (value.clone(), mode));
                    }
                    None if optional == Some(true) => {}
                    None => return Err(format!("{name:?} references non-existent key: {}", item.key)),
                }
            }
        }
    }
    Ok(())
}

fn downward(
    files: &mut Files,
    pod: &Pod,
    facts: &PodFacts,
    items: Option<&[DownwardAPIVolumeFile]>,
    default_mode: u32,
) -> Result<(), String> {
    for item in items.into_iter().flatten() {
        let value = if let Some(reference) = &item.field_ref {
            fields::field(pod, facts, &reference.field_path)?
        } else if let Some(selector) = &item.resource_field_ref {
            let own = pod
                .spec
                .as_ref()
                .and_then(|s| s.containers.first())
                .ok_or("the pod has no containers")?;
            fields::resource(pod, own, facts, selector)?
        } else {
            continue;
        };
        let mode = item.mode.map_or(default_mode, |m| mode(Some(m)));
        files.insert(safe_path(&item.path)?, (value.into_bytes(), mode));
    }
    Ok(())
}

/// A relative path that stays inside, and does not meet the names that the atomic writer uses.
fn safe_path(path: &str) -> Result<String, String> {
    let fine = !path.is_empty()
        && !path.starts_with("..")
        && Path::new(path).components().all(|c| matches!(c, Component::Normal(_)));
    if fine {
        Ok(path.to_owned())
    } else {
        Err(format!("invalid path {path:?}: it must be relative, without '..'"))
    }
}

/// Writes `files` below `dir` so that readers see all of the old or all of the new ones.
fn write_atomically(dir: &Path, files: &Files, group: Option<u32>) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let stamp = format!("..{:x}", rand::random::<u64>());
    let version = dir.join(&stamp);
    std::fs::create_dir(&version)?;
    for (path, (content, mode)) in files {
        let target = version.join(path);
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(&target, content)?;
        let mut mode = *mode;
        if let Some(group) = group {
            chown(&target, None, Some(group))?;
            mode |= 0o440;
        }
        std::fs::set_permissions(&target, std::fs::Permissions::from_mode(mode))?;
    }
    let old = std::fs::read_link(dir.join(DATA)).ok();
    let temporary = dir.join("..data_tmp");
    let _ = std::fs::remove_file(&temporary);
    symlink(&stamp, &temporary)?;
    std::fs::rename(&temporary, dir.join(DATA))?;
    // Names that readers use: links through the one that was just switched.
    let tops: std::collections::BTreeSet<&str> = files.keys().filter_map(|path| path.split('/').next()).collect();
    for top in &tops {
        let link = dir.join(top);
        if std::fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(DATA).join(top), &link)?;
        }
    }
    for entry in std::fs::read_dir(dir)?.flatten() {
        let name = entry.file_name();
        let stale = name
            .to_str()
            .is_some_and(|name| !name.starts_with("..") && !tops.contains(name));
        if stale {
            std::fs::remove_file(entry.path())?;
        }
    }
    if let Some(old) = old.filter(|old| old.as_os_str() != stamp.as_str()) {
        std::fs::remove_dir_all(dir.join(old))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(pairs: &[(&str, &str)]) -> Files {
        pairs
            .iter()
            .map(|(path, text)| ((*path).to_owned(), (text.as_bytes().to_vec(), 0o640)))
            .collect()
    }

    #[test]
    fn a_new_version_replaces_all_files_at_once() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("v");
        write_atomically(&path, &files(&[("a", "1"), ("sub/b", "1"), ("gone", "1")]), None).expect("write");
        let before = std::fs::read_link(path.join(DATA)).expect("link");
        write_atomically(&path, &files(&[("a", "2"), ("sub/b", "2")]), None).expect("write");
        assert_eq!(std::fs::read_to_string(path.join("a")).expect("a"), "2");
        assert_eq!(std::fs::read_to_string(path.join("sub/b")).expect("b"), "2");
        assert!(!path.join("gone").exists() && std::fs::symlink_metadata(path.join("gone")).is_err());
        assert!(!path.join(before).exists(), "the old version is removed");
        let mode = std::fs::metadata(path.join("a")).expect("a").permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
    }

    #[test]
    fn paths_cannot_leave_the_volume() {
        for bad in ["", "/etc/passwd", "../x", "a/../../x", "..data"] {
            assert!(safe_path(bad).is_err(), "{bad}");
        }
        assert_eq!(safe_path("a/b"), Ok("a/b".into()));
    }

    #[test]
    fn a_missing_key_is_an_error_unless_optional() {
        let data = || Some(BTreeMap::from([("k".to_owned(), b"v".to_vec())]));
        let item = |key: &str| KeyToPath {
            key: key.into(),
            path: "p".into(),
            ..KeyToPath::default()
        };
        let mut out = Files::new();
        let error = select(&mut out, data(), Some(&[item("x")]), 0o644, None, "cm").expect_err("missing");
        assert_eq!(error, "\"cm\" references non-existent key: x");
        select(&mut out, data(), Some(&[item("x"), item("k")]), 0o600, Some(true), "cm").expect("optional");
        assert_eq!(out["p"], (b"v".to_vec(), 0o600));
    }
}
