from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_KIND_UNSPECIFIED: _ClassVar[JobKind]
    JOB_KIND_MERGE: _ClassVar[JobKind]
    JOB_KIND_FETCH: _ClassVar[JobKind]
    JOB_KIND_AUDIT: _ClassVar[JobKind]
    JOB_KIND_EVOLVE: _ClassVar[JobKind]

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_WAITING_FOR_PEERS: _ClassVar[JobState]
    JOB_STATE_FETCHING: _ClassVar[JobState]
    JOB_STATE_MERGING: _ClassVar[JobState]
    JOB_STATE_VERIFYING: _ClassVar[JobState]
    JOB_STATE_SUCCEEDED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]
    JOB_STATE_SEARCHING: _ClassVar[JobState]
JOB_KIND_UNSPECIFIED: JobKind
JOB_KIND_MERGE: JobKind
JOB_KIND_FETCH: JobKind
JOB_KIND_AUDIT: JobKind
JOB_KIND_EVOLVE: JobKind
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_WAITING_FOR_PEERS: JobState
JOB_STATE_FETCHING: JobState
JOB_STATE_MERGING: JobState
JOB_STATE_VERIFYING: JobState
JOB_STATE_SUCCEEDED: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_CANCELLED: JobState
JOB_STATE_SEARCHING: JobState

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("pid", "peer_id", "publisher", "network", "addresses", "peer_api", "version", "home", "up_seconds", "peers", "experts", "jobs_running")
    PID_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    PUBLISHER_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    PEER_API_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HOME_FIELD_NUMBER: _ClassVar[int]
    UP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    JOBS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    pid: int
    peer_id: str
    publisher: str
    network: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    peer_api: str
    version: str
    home: str
    up_seconds: float
    peers: int
    experts: int
    jobs_running: int
    def __init__(self, pid: _Optional[int] = ..., peer_id: _Optional[str] = ..., publisher: _Optional[str] = ..., network: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., peer_api: _Optional[str] = ..., version: _Optional[str] = ..., home: _Optional[str] = ..., up_seconds: _Optional[float] = ..., peers: _Optional[int] = ..., experts: _Optional[int] = ..., jobs_running: _Optional[int] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShutdownResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PeerView(_message.Message):
    __slots__ = ("peer_id", "addresses", "direction", "latency_ms", "experts", "fault")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    LATENCY_MS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    direction: str
    latency_ms: float
    experts: int
    fault: str
    def __init__(self, peer_id: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., direction: _Optional[str] = ..., latency_ms: _Optional[float] = ..., experts: _Optional[int] = ..., fault: _Optional[str] = ...) -> None: ...

class ListPeersRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListPeersResponse(_message.Message):
    __slots__ = ("peers", "next_page_token")
    PEERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedCompositeFieldContainer[PeerView]
    next_page_token: str
    def __init__(self, peers: _Optional[_Iterable[_Union[PeerView, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class CreateInviteRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CreateInviteResponse(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: str
    def __init__(self, ticket: _Optional[str] = ...) -> None: ...

class JoinNetworkRequest(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: str
    def __init__(self, ticket: _Optional[str] = ...) -> None: ...

class JoinNetworkResponse(_message.Message):
    __slots__ = ("network", "peer_id")
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    network: str
    peer_id: str
    def __init__(self, network: _Optional[str] = ..., peer_id: _Optional[str] = ...) -> None: ...

class AnnounceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AnnounceResponse(_message.Message):
    __slots__ = ("sequence", "experts")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    experts: int
    def __init__(self, sequence: _Optional[int] = ..., experts: _Optional[int] = ...) -> None: ...

class Expert(_message.Message):
    __slots__ = ("model_id", "name", "licence", "architecture", "base", "size", "publisher", "holders", "local", "fault")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    PUBLISHER_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    name: str
    licence: str
    architecture: str
    base: str
    size: int
    publisher: str
    holders: _containers.RepeatedScalarFieldContainer[str]
    local: bool
    fault: str
    def __init__(self, model_id: _Optional[str] = ..., name: _Optional[str] = ..., licence: _Optional[str] = ..., architecture: _Optional[str] = ..., base: _Optional[str] = ..., size: _Optional[int] = ..., publisher: _Optional[str] = ..., holders: _Optional[_Iterable[str]] = ..., local: _Optional[bool] = ..., fault: _Optional[str] = ...) -> None: ...

class SearchExpertsRequest(_message.Message):
    __slots__ = ("query", "page_size", "page_token")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    query: str
    page_size: int
    page_token: str
    def __init__(self, query: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class SearchExpertsResponse(_message.Message):
    __slots__ = ("experts", "next_page_token")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[Expert]
    next_page_token: str
    def __init__(self, experts: _Optional[_Iterable[_Union[Expert, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class PlanInput(_message.Message):
    __slots__ = ("reference", "model_id", "role", "licence", "size", "local", "holders")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    reference: str
    model_id: str
    role: str
    licence: str
    size: int
    local: bool
    holders: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, reference: _Optional[str] = ..., model_id: _Optional[str] = ..., role: _Optional[str] = ..., licence: _Optional[str] = ..., size: _Optional[int] = ..., local: _Optional[bool] = ..., holders: _Optional[_Iterable[str]] = ...) -> None: ...

class PlanMergeRequest(_message.Message):
    __slots__ = ("recipe",)
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    recipe: str
    def __init__(self, recipe: _Optional[str] = ...) -> None: ...

class PlanMergeResponse(_message.Message):
    __slots__ = ("plan", "operator", "inputs", "tensors", "output_bytes", "fetch_bytes", "peak_ram_bytes", "warnings", "read_bytes", "licence")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_RAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    plan: str
    operator: str
    inputs: _containers.RepeatedCompositeFieldContainer[PlanInput]
    tensors: int
    output_bytes: int
    fetch_bytes: int
    peak_ram_bytes: int
    warnings: _containers.RepeatedScalarFieldContainer[str]
    read_bytes: int
    licence: str
    def __init__(self, plan: _Optional[str] = ..., operator: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[PlanInput, _Mapping]]] = ..., tensors: _Optional[int] = ..., output_bytes: _Optional[int] = ..., fetch_bytes: _Optional[int] = ..., peak_ram_bytes: _Optional[int] = ..., warnings: _Optional[_Iterable[str]] = ..., read_bytes: _Optional[int] = ..., licence: _Optional[str] = ...) -> None: ...

class AgreementView(_message.Message):
    __slots__ = ("digest", "provider", "requester", "purpose", "models", "expires_at")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    REQUESTER_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    digest: str
    provider: str
    requester: str
    purpose: str
    models: _containers.RepeatedScalarFieldContainer[str]
    expires_at: float
    def __init__(self, digest: _Optional[str] = ..., provider: _Optional[str] = ..., requester: _Optional[str] = ..., purpose: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ..., expires_at: _Optional[float] = ...) -> None: ...

class Transfer(_message.Message):
    __slots__ = ("peer_id", "bytes", "seconds")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    bytes: int
    seconds: float
    def __init__(self, peer_id: _Optional[str] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("what", "done", "total")
    WHAT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    what: str
    done: int
    total: int
    def __init__(self, what: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class AuditResult(_message.Message):
    __slots__ = ("checked", "failed", "statement", "passed")
    CHECKED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    checked: int
    failed: int
    statement: str
    passed: bool
    def __init__(self, checked: _Optional[int] = ..., failed: _Optional[int] = ..., statement: _Optional[str] = ..., passed: _Optional[bool] = ...) -> None: ...

class JobError(_message.Message):
    __slots__ = ("reason", "why", "hint", "exit_code", "problems")
    REASON_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    why: str
    hint: str
    exit_code: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, reason: _Optional[str] = ..., why: _Optional[str] = ..., hint: _Optional[str] = ..., exit_code: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "kind", "state", "since", "waiting_on", "subject", "directory", "plan", "agreements", "transfers", "progress", "model_id", "audit", "error", "warnings", "licence", "report", "generation", "search")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    WAITING_ON_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    AGREEMENTS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: JobKind
    state: JobState
    since: float
    waiting_on: str
    subject: str
    directory: str
    plan: str
    agreements: _containers.RepeatedCompositeFieldContainer[AgreementView]
    transfers: _containers.RepeatedCompositeFieldContainer[Transfer]
    progress: Progress
    model_id: str
    audit: AuditResult
    error: JobError
    warnings: _containers.RepeatedScalarFieldContainer[str]
    licence: str
    report: MergeReport
    generation: Generation
    search: SearchResult
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[_Union[JobKind, str]] = ..., state: _Optional[_Union[JobState, str]] = ..., since: _Optional[float] = ..., waiting_on: _Optional[str] = ..., subject: _Optional[str] = ..., directory: _Optional[str] = ..., plan: _Optional[str] = ..., agreements: _Optional[_Iterable[_Union[AgreementView, _Mapping]]] = ..., transfers: _Optional[_Iterable[_Union[Transfer, _Mapping]]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., model_id: _Optional[str] = ..., audit: _Optional[_Union[AuditResult, _Mapping]] = ..., error: _Optional[_Union[JobError, _Mapping]] = ..., warnings: _Optional[_Iterable[str]] = ..., licence: _Optional[str] = ..., report: _Optional[_Union[MergeReport, _Mapping]] = ..., generation: _Optional[_Union[Generation, _Mapping]] = ..., search: _Optional[_Union[SearchResult, _Mapping]] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("number", "of", "share", "left", "best", "mean", "evaluated", "replayed", "rows")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    number: int
    of: int
    share: float
    left: float
    best: float
    mean: float
    evaluated: int
    replayed: bool
    rows: _containers.RepeatedCompositeFieldContainer[Coefficients]
    def __init__(self, number: _Optional[int] = ..., of: _Optional[int] = ..., share: _Optional[float] = ..., left: _Optional[float] = ..., best: _Optional[float] = ..., mean: _Optional[float] = ..., evaluated: _Optional[int] = ..., replayed: _Optional[bool] = ..., rows: _Optional[_Iterable[_Union[Coefficients, _Mapping]]] = ...) -> None: ...

class Coefficients(_message.Message):
    __slots__ = ("model", "weights")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    weights: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, model: _Optional[str] = ..., weights: _Optional[_Iterable[float]] = ...) -> None: ...

class SearchResult(_message.Message):
    __slots__ = ("generations", "of", "cost", "start_cost")
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    START_COST_FIELD_NUMBER: _ClassVar[int]
    generations: int
    of: int
    cost: float
    start_cost: float
    def __init__(self, generations: _Optional[int] = ..., of: _Optional[int] = ..., cost: _Optional[float] = ..., start_cost: _Optional[float] = ...) -> None: ...

class MergeReport(_message.Message):
    __slots__ = ("lines", "flags", "tensors", "measured", "zeros", "text", "readings")
    LINES_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    ZEROS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    READINGS_FIELD_NUMBER: _ClassVar[int]
    lines: _containers.RepeatedScalarFieldContainer[str]
    flags: _containers.RepeatedScalarFieldContainer[str]
    tensors: int
    measured: int
    zeros: int
    text: str
    readings: _containers.RepeatedCompositeFieldContainer[Reading]
    def __init__(self, lines: _Optional[_Iterable[str]] = ..., flags: _Optional[_Iterable[str]] = ..., tensors: _Optional[int] = ..., measured: _Optional[int] = ..., zeros: _Optional[int] = ..., text: _Optional[str] = ..., readings: _Optional[_Iterable[_Union[Reading, _Mapping]]] = ...) -> None: ...

class Reading(_message.Message):
    __slots__ = ("model", "bits_per_byte", "perplexity", "tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BITS_PER_BYTE_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    bits_per_byte: float
    perplexity: float
    tokens: int
    def __init__(self, model: _Optional[str] = ..., bits_per_byte: _Optional[float] = ..., perplexity: _Optional[float] = ..., tokens: _Optional[int] = ...) -> None: ...

class StartMergeRequest(_message.Message):
    __slots__ = ("request_id", "recipe", "directory", "publish_as", "resume", "threads", "max_memory", "perplexity")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_AS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    MAX_MEMORY_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    recipe: str
    directory: str
    publish_as: str
    resume: bool
    threads: int
    max_memory: int
    perplexity: str
    def __init__(self, request_id: _Optional[str] = ..., recipe: _Optional[str] = ..., directory: _Optional[str] = ..., publish_as: _Optional[str] = ..., resume: _Optional[bool] = ..., threads: _Optional[int] = ..., max_memory: _Optional[int] = ..., perplexity: _Optional[str] = ...) -> None: ...

class StartMergeResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class Shape(_message.Message):
    __slots__ = ("layers", "groups", "components", "densities", "operators")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    DENSITIES_FIELD_NUMBER: _ClassVar[int]
    OPERATORS_FIELD_NUMBER: _ClassVar[int]
    layers: int
    groups: bool
    components: bool
    densities: bool
    operators: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, layers: _Optional[int] = ..., groups: _Optional[bool] = ..., components: _Optional[bool] = ..., densities: _Optional[bool] = ..., operators: _Optional[_Iterable[str]] = ...) -> None: ...

class StartEvolveRequest(_message.Message):
    __slots__ = ("request_id", "recipe", "directory", "resume", "tasks", "reported", "shape", "seed", "budget", "processes")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    REPORTED_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    recipe: str
    directory: str
    resume: bool
    tasks: _containers.RepeatedScalarFieldContainer[str]
    reported: _containers.RepeatedScalarFieldContainer[str]
    shape: Shape
    seed: int
    budget: int
    processes: int
    def __init__(self, request_id: _Optional[str] = ..., recipe: _Optional[str] = ..., directory: _Optional[str] = ..., resume: _Optional[bool] = ..., tasks: _Optional[_Iterable[str]] = ..., reported: _Optional[_Iterable[str]] = ..., shape: _Optional[_Union[Shape, _Mapping]] = ..., seed: _Optional[int] = ..., budget: _Optional[int] = ..., processes: _Optional[int] = ...) -> None: ...

class StartEvolveResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class StartGetRequest(_message.Message):
    __slots__ = ("request_id", "model_id", "publisher")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    PUBLISHER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_id: str
    publisher: str
    def __init__(self, request_id: _Optional[str] = ..., model_id: _Optional[str] = ..., publisher: _Optional[str] = ...) -> None: ...

class StartGetResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class StartAuditRequest(_message.Message):
    __slots__ = ("request_id", "subject")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    subject: str
    def __init__(self, request_id: _Optional[str] = ..., subject: _Optional[str] = ...) -> None: ...

class StartAuditResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class CancelJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class SettleJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class SettleJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class ResumeJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ResumeJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...
