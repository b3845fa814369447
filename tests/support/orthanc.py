"""A real PACS, Orthanc. Debian's 1.10 listens on every address, so only inside a namespace without others."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import requests
from waiting import wait_for

_PLUGINS = Path("/usr/lib/orthanc")


def alone() -> bool:
    """Whether loopback is the only interface."""
    names = [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    return names == ["lo"]


@dataclass
class Pacs:
    """A running Orthanc that knows the station MEDFL at ``move_port``."""

    folder: Path
    http: int
    dicom: int
    move_port: int
    process: subprocess.Popen[bytes] | None = None
    tls: Path | None = None  # folder of authority.pem, pacs.pem and pacs.key, where DICOM is to go over TLS

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    def start(self) -> None:
        plugins = [
            str(path) for path in sorted(_PLUGINS.glob("lib*.so.*")) if "DicomWeb" in path.name or "Gdcm" in path.name
        ]
        configuration = {
            "Name": "TEST", "StorageDirectory": str(self.folder / "db"), "IndexDirectory": str(self.folder / "db"),
            "Plugins": plugins, "HttpPort": self.http, "DicomPort": self.dicom, "DicomAet": "ORTHANC",
            "DicomCheckCalledAet": True, "AuthenticationEnabled": True, "RegisteredUsers": {"reader": "right"},
            "DicomAlwaysAllowStore": False, "DicomAlwaysAllowEcho": True, "DicomAlwaysAllowFind": False,
            "DicomAlwaysAllowGet": False, "DicomAlwaysAllowMove": False,
            "DicomModalities": {"medfl": {"AET": "MEDFL", "Host": "127.0.0.1", "Port": self.move_port}},
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "Host": f"127.0.0.1:{self.http}"},
            "HttpThreadsCount": 4, "SyncStorageArea": False,
        }  # fmt: skip
        if self.tls is not None:
            configuration |= {
                "DicomTlsEnabled": True, "DicomTlsCertificate": str(self.tls / "pacs.pem"),
                "DicomTlsPrivateKey": str(self.tls / "pacs.key"),
                "DicomTlsTrustedCertificates": str(self.tls / "authority.pem"),
                "DicomTlsRemoteCertificateRequired": True,
            }  # fmt: skip
            configuration["DicomModalities"]["medfl"]["UseDicomTls"] = True  # type: ignore[index]
        (self.folder / "orthanc.json").write_text(json.dumps(configuration))
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(["Orthanc", str(self.folder / "orthanc.json")], stdout=log, stderr=log)

        def answers() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            try:
                return requests.get(self.url + "/system", auth=("reader", "right"), timeout=5).ok
            except requests.RequestException:
                return False

        wait_for(answers)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(120)
            self.process = None

    def upload(self, paths: list[Path]) -> None:
        with requests.Session() as session:
            session.auth = ("reader", "right")
            for path in paths:
                session.post(self.url + "/instances", data=path.read_bytes(), timeout=120).raise_for_status()

    def clear(self) -> None:
        with requests.Session() as session:
            session.auth = ("reader", "right")
            for patient in session.get(self.url + "/patients", timeout=60).json():
                session.delete(f"{self.url}/patients/{patient}", timeout=120)
