"""gcp-storage-emulator, with what tensorstore needs of Google's protocol besides: generations of what is read."""

from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_download = objects.download


def download(request, response, storage, *of, **named):
    """Say which generation is read, and nothing else if it is the one that the reader has."""
    try:
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])["generation"]
    except NotFound:
        found = None
    if found is not None:
        response["x-goog-generation"] = found
        if found in request.query.get("ifGenerationNotMatch", ()):
            response.status = HTTPStatus.NOT_MODIFIED
            return
    _download(request, response, storage, *of, **named)


objects.download = download

if __name__ == "__main__":
    from gcp_storage_emulator.__main__ import main

    main()
