//! Which programs an image name stands for.
//!
//! There is no registry: Mantlet's own images resolve to the binaries beside the running one, the labs' sample images to
//! `mantlet-samples`, and every other image to the host's programs with the container's own `command`. Called by the node
//! agent when it starts a container; pure but for looking whether a binary exists.

use std::path::{Path, PathBuf};

use crate::rootfs::{PROGRAM_DIR, Program, ProgramSource};

/// What an image gives a container.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// Files in `/usr/local/bin`.
    pub programs: Vec<Program>,
    /// Program and leading arguments when the container has no `command`.
    pub entrypoint: Vec<String>,
    /// One sentence for the pod's events.
    pub described: String,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ImageError {
    /// The host's files are used, and nothing says which of them to run.
    #[error(
        "image {0:?} is not one of Mantlet's own, so the container runs programs of the host and must name one in `command`"
    )]
    NoCommand(String),
    /// The name is no image reference.
    #[error("couldn't parse image name {0:?}: invalid reference format")]
    BadName(String),
    /// The binary is not installed.
    #[error("image {image:?} needs {program}, which is not in {dir}")]
    Missing {
        /// The image.
        image: String,
        /// The binary.
        program: &'static str,
        /// Where it was looked for.
        dir: String,
    },
}

/// Resolves image names with the binaries in one directory.
#[derive(Clone, Debug)]
pub struct Images {
    bin_dir: PathBuf,
}

/// The path of an image without registry host, tag and digest: `gcr.io/x/customers:1.0.0` → `x/customers`.
fn repository(image: &str) -> Option<&str> {
    let fits = !image.is_empty()
        && image.len() <= 255
        && image
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"/:@._-".contains(&b));
    if !fits {
        return None;
    }
    let name = image.split('@').next().unwrap_or(image);
    let last_slash = name.rfind('/').map_or(0, |at| at + 1);
    let end = name[last_slash..].find(':').map_or(name.len(), |at| last_slash + at);
    let name = &name[..end];
    let bare = match name.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => rest,
        _ => name,
    };
    (!bare.is_empty() && !bare.ends_with('/')).then_some(bare)
}

impl Images {
    /// `bin_dir` holds Mantlet's binaries.
    #[must_use]
    pub fn new(bin_dir: &Path) -> Self {
        Self {
            bin_dir: bin_dir.to_owned(),
        }
    }

    fn program(&self, image: &str, program: &'static str) -> Result<PathBuf, ImageError> {
        let path = self.bin_dir.join(program);
        if path.is_file() {
            Ok(path)
        } else {
            Err(ImageError::Missing {
                image: image.into(),
                program,
                dir: self.bin_dir.display().to_string(),
            })
        }
    }

    /// Resolves `image` for a container that has (or has not) a `command` of its own.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn resolve(&self, image: &str, has_command: bool) -> Result<Image, ImageError> {
        let name = repository(image).ok_or_else(|| ImageError::BadName(image.into()))?;
        let own = |program: &'static str, link: Option<&str>, args: &[&str]| -> Result<Image, ImageError> {
            let mut programs = vec![Program {
                name: program.into(),
                source: ProgramSource::Bind(self.program(image, program)?),
            }];
            if let Some(link) = link {
                programs.push(Program {
                    name: link.into(),
                    source: ProgramSource::Link(program.into()),
                });
            }
            let entrypoint = std::iter::once(format!("{PROGRAM_DIR}/{program}"))
                .chain(args.iter().map(|arg| (*arg).to_owned()))
                .collect();
            Ok(Image {
                programs,
                entrypoint,
                described: format!("the local program {program}"),
            })
        };
        match name {
            "mantlet/pilot" => own("mantletd", Some("pilot-discovery"), &[]),
            "mantlet/proxyv2" | "auto" => {
                let mut image = own("mantlet-proxy", Some("pilot-agent"), &[])?;
                // Without it the container works, only `sudo` is not found.
                if let Ok(sudo) = self.program(name, "mantlet-sudo") {
                    image.programs.push(Program {
                        name: "sudo".into(),
                        source: ProgramSource::SetUidCopy(sudo),
                    });
                }
                Ok(image)
            }
            _ if !has_command && name.rsplit('/').next() == Some("customers") => {
                own("mantlet-samples", None, &["customers"])
            }
            _ if !has_command && name.rsplit('/').next() == Some("web-frontend") => {
                own("mantlet-samples", None, &["web-frontend"])
            }
            _ if !has_command && name.rsplit('/').next() == Some("catalog") => {
                own("mantlet-samples", None, &["catalog"])
            }
            _ if !has_command && name.rsplit('/').next() == Some("ext-authz") => {
                own("mantlet-samples", None, &["ext-authz"])
            }
            _ if !has_command
                && matches!(
                    name.rsplit('/').next(),
                    Some("guestbook" | "guestbook-v1" | "guestbook-v2")
                ) =>
            {
                own("mantlet-samples", None, &["guestbook"])
            }
            _ if !has_command && name.rsplit('/').next() == Some("upload") => own("mantlet-samples", None, &["upload"]),
            _ if !has_command && name.rsplit('/').next() == Some("analyzer") => {
                own("mantlet-samples", None, &["analyzer"])
            }
            _ if has_command => Ok(Image {
                programs: Vec::new(),
                entrypoint: Vec::new(),
                described: "programs of the host with the container's command".into(),
            }),
            _ => Err(ImageError::NoCommand(image.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_tags_and_digests_do_not_matter() {
        for name in [
            "gcr.io/tetratelabs/customers:1.0.0",
            "tetratelabs/customers",
            "localhost:5000/tetratelabs/customers@sha256:ab",
        ] {
            assert_eq!(repository(name), Some("tetratelabs/customers"), "{name}");
        }
        assert_eq!(repository("docker.io/mantlet/proxyv2:0.1"), Some("mantlet/proxyv2"));
        assert_eq!(repository("nginx"), Some("nginx"));
        for bad in ["", "a b", "x/", "../../etc;"] {
            assert_eq!(repository(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_foreign_image_needs_a_command() {
        let dir = tempfile::tempdir().expect("dir");
        let images = Images::new(dir.path());
        assert!(matches!(
            images.resolve("nginx:1.25", false),
            Err(ImageError::NoCommand(_))
        ));
        assert!(images.resolve("curlimages/curl", true).expect("ok").programs.is_empty());
        let error = images
            .resolve("gcr.io/tetratelabs/customers:1.0.0", false)
            .expect_err("missing");
        assert!(error.to_string().contains("mantlet-samples"), "{error}");
    }

    #[test]
    fn the_proxy_image_has_its_links_and_sudo() {
        let dir = tempfile::tempdir().expect("dir");
        for name in ["mantlet-proxy", "mantlet-sudo"] {
            std::fs::write(dir.path().join(name), "").expect("write");
        }
        let image = Images::new(dir.path()).resolve("auto", false).expect("ok");
        assert_eq!(image.entrypoint, ["/usr/local/bin/mantlet-proxy"]);
        let names: Vec<_> = image.programs.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["mantlet-proxy", "pilot-agent", "sudo"]);
    }
}
