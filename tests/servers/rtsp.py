"""An RTSP server: GStreamer's own, from Debian, run by Debian's Python.

    /usr/bin/python3 tests/servers/rtsp.py [--port P] [--auth basic|digest]

It says its port, serves colour bars at /h264, /h264-10bit and /jpeg, a tone at /audio, and ends
with its standard input. Commands there: "drop" ends all sessions, "size W H" changes the pictures.
"auth" asks for `USER` and `PASSWORD`.
"""

import argparse
import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402

USER, PASSWORD = "eye", "s3cret:w@rd"
BARS = (
    "videotestsrc is-live=true pattern=smpte100 ! "
    "capsfilter name=size caps=video/x-raw,{0},framerate=30/1"
)
X264 = "x264enc tune=zerolatency sliced-threads=false speed-preset=ultrafast key-int-max=10"
SIZE = "width={0},height={1}"
PIPELINES = {
    "h264": f"{BARS} ! {X264} ! rtph264pay name=pay0 config-interval=-1",
    "h264-10bit": f"{BARS},format=I420_10LE ! {X264} ! rtph264pay name=pay0 config-interval=-1",
    "jpeg": f"{BARS},format=I420 ! jpegenc ! rtpjpegpay name=pay0",
    "audio": "audiotestsrc is-live=true ! mulawenc ! rtppcmupay name=pay0",
}


class Server:
    def __init__(self, port: int, auth: str | None) -> None:
        self.rtsp = GstRtspServer.RTSPServer(service=str(port), address="127.0.0.1")
        self.medias: list[GstRtspServer.RTSPMedia] = []
        if auth:
            self.ask_for_password(auth)
        for name, pipeline in PIPELINES.items():
            factory = GstRtspServer.RTSPMediaFactory()
            factory.set_launch(f"( {pipeline.format(SIZE.format(320, 240))} )")
            factory.connect("media-configure", self.keep)
            if auth:
                factory.add_role_from_structure(
                    Gst.Structure.from_string(
                        "viewer, media.factory.access=true, media.factory.construct=true"
                    )[0]
                )
            self.rtsp.get_mount_points().add_factory(f"/{name}", factory)
        self.rtsp.attach(None)

    def keep(self, factory: GstRtspServer.RTSPMediaFactory, media: GstRtspServer.RTSPMedia) -> None:
        self.medias.append(media)
        media.connect("unprepared", self.medias.remove)

    def ask_for_password(self, method: str) -> None:
        token = GstRtspServer.RTSPToken()
        token.set_string(GstRtspServer.RTSP_TOKEN_MEDIA_FACTORY_ROLE, "viewer")
        auth = GstRtspServer.RTSPAuth()
        if method == "digest":
            auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
            auth.add_digest(USER, PASSWORD, token)
        else:
            auth.add_basic(GstRtspServer.RTSPAuth.make_basic(USER, PASSWORD), token)
        self.rtsp.set_auth(auth)

    def obey(self, line: str) -> None:
        command, *words = line.split()
        if command == "drop":
            self.rtsp.client_filter(lambda *_: GstRtspServer.RTSPFilterResult.REMOVE)
        elif command == "size":
            caps = Gst.Caps.from_string(f"video/x-raw,{SIZE.format(*words)},framerate=30/1")
            for media in self.medias:
                media.get_element().get_by_name("size").set_property("caps", caps)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--auth", choices=("basic", "digest"))
    arguments = parser.parse_args()
    Gst.init(None)
    server = Server(arguments.port, arguments.auth)
    loop = GLib.MainLoop()

    def heard(channel: GLib.IOChannel, condition: GLib.IOCondition) -> bool:
        line = sys.stdin.readline()
        if line:
            server.obey(line)
            print("done", flush=True)
        else:
            loop.quit()
        return True

    GLib.io_add_watch(sys.stdin, GLib.PRIORITY_DEFAULT, GLib.IO_IN | GLib.IO_HUP, heard)
    print(server.rtsp.get_bound_port(), flush=True)
    loop.run()


if __name__ == "__main__":
    main()
