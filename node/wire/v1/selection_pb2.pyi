from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Candidate(_message.Message):
    __slots__ = ("model_id", "name", "base", "author", "fingerprint", "moved")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    name: str
    base: str
    author: str
    fingerprint: bytes
    moved: int
    def __init__(self, model_id: _Optional[str] = ..., name: _Optional[str] = ..., base: _Optional[str] = ..., author: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., moved: _Optional[int] = ...) -> None: ...

class ReadCandidatesRequest(_message.Message):
    __slots__ = ("references",)
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    references: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, references: _Optional[_Iterable[str]] = ...) -> None: ...

class ReadCandidatesResponse(_message.Message):
    __slots__ = ("candidate",)
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    candidate: Candidate
    def __init__(self, candidate: _Optional[_Union[Candidate, _Mapping]] = ...) -> None: ...

class FindPartnersRequest(_message.Message):
    __slots__ = ("sketch", "base", "count")
    SKETCH_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    sketch: bytes
    base: bytes
    count: int
    def __init__(self, sketch: _Optional[bytes] = ..., base: _Optional[bytes] = ..., count: _Optional[int] = ...) -> None: ...

class FindPartnersResponse(_message.Message):
    __slots__ = ("candidate", "compared", "moved")
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    COMPARED_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    candidate: Candidate
    compared: int
    moved: int
    def __init__(self, candidate: _Optional[_Union[Candidate, _Mapping]] = ..., compared: _Optional[int] = ..., moved: _Optional[int] = ...) -> None: ...

class FaultView(_message.Message):
    __slots__ = ("model_id", "fingerprint", "publisher", "peer_id", "finders", "standing")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PUBLISHER_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    FINDERS_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    fingerprint: str
    publisher: str
    peer_id: str
    finders: _containers.RepeatedScalarFieldContainer[str]
    standing: str
    def __init__(self, model_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., publisher: _Optional[str] = ..., peer_id: _Optional[str] = ..., finders: _Optional[_Iterable[str]] = ..., standing: _Optional[str] = ...) -> None: ...

class ListFaultsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListFaultsResponse(_message.Message):
    __slots__ = ("faults", "next_page_token")
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    faults: _containers.RepeatedCompositeFieldContainer[FaultView]
    next_page_token: str
    def __init__(self, faults: _Optional[_Iterable[_Union[FaultView, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ListOutcomesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListOutcomesResponse(_message.Message):
    __slots__ = ("author", "at", "digest", "outcome", "judged", "models", "again")
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    JUDGED_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    author: str
    at: int
    digest: str
    outcome: bytes
    judged: str
    models: _containers.RepeatedScalarFieldContainer[str]
    again: bool
    def __init__(self, author: _Optional[str] = ..., at: _Optional[int] = ..., digest: _Optional[str] = ..., outcome: _Optional[bytes] = ..., judged: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ..., again: _Optional[bool] = ...) -> None: ...

class RecordOutcomeRequest(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: bytes
    def __init__(self, outcome: _Optional[bytes] = ...) -> None: ...

class RecordOutcomeResponse(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...
