package federation

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"go.uber.org/zap"

	"culvert/certs"
	"culvert/federation/state"
	"culvert/federation/store"
	"culvert/internal/sample"
)

// maxBody bounds an entry that is registered, in bytes.
const maxBody = 64 << 10

// LeaderHeader is the address of the leader's sidecar, for its own datacenter.
const LeaderHeader = "X-Culvert-Leader-Address"

// The reasons for which a request is refused, beside those of
// [state.ConflictError].
const (
	refusedCertificate = "certificate"
	refusedOwner       = "not_owner"
	refusedInvalid     = "invalid"
	refusedFull        = "full"
)

// astrayAfter is how long a sidecar may know no leader before it sends its
// clients elsewhere: longer than an election, or all of them would come at once.
const astrayAfter = 5 * time.Second

// A Store is the canonical one; [store.Store] is.
type Store interface {
	Source
	Register(ctx context.Context, r state.Registration) (store.Lease, error)
	Remove(ctx context.Context, keys []state.Key, left bool) error
	Leader() (node, address string, ok bool)
	Peers() []store.Peer
	RemovePeer(ctx context.Context, node string) error
	Greeting() store.Greeting
	Promise(p store.Proposal) error
}

// APIOptions configure [NewAPI].
type APIOptions struct {
	Datacenter, Domain string // the primary's
	// Identity reads who a verified client is. It is required.
	Identity func(cs tls.ConnectionState) (certs.Identity, error)
	Log      *zap.Logger // nil means no log
	Metrics  *Metrics    // nil means none
}

// api is the federation API, as the primary's sidecars serve it.
type api struct {
	reads
	store  Store
	o      APIOptions
	log    *zap.Logger
	warned sample.Sampler

	mu         sync.Mutex
	leaderless time.Time // since when no leader is known; zero while one is
}

// NewAPI returns the federation API over a store. It is for connections whose
// clients were verified. What a client may write its certificate alone decides.
func NewAPI(s Store, o APIOptions) http.Handler {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(nil)
	}
	log := o.Log.Named("federation")
	a := &api{reads: reads{source: s, log: log}, store: s, o: o, log: log}
	a.astray = a.alone
	mux := http.NewServeMux()
	a.routes(mux)
	for _, kind := range []state.Kind{state.KindServer, state.KindGateway} {
		path := "/v1/federation-state/{dc}/" + string(kind) + "/{name}"
		mux.HandleFunc("PUT "+path, func(w http.ResponseWriter, r *http.Request) { a.put(w, r, kind) })
		mux.HandleFunc("DELETE "+path, func(w http.ResponseWriter, r *http.Request) { a.remove(w, r, kind) })
	}
	mux.HandleFunc("GET /v1/federation-peers", a.peers)
	mux.HandleFunc("DELETE /v1/federation-peers/{node}", a.removePeer)
	mux.HandleFunc("GET /v1/federation-store", a.greet)
	mux.HandleFunc("POST /v1/federation-store/promise", a.promise)
	return mux
}

// alone tells whether this sidecar has known no leader for a while. It may be cut
// off from the others, or its disk full: what it answers gets older and older,
// and a client that keeps its connection would never hear of anything new.
func (a *api) alone() bool {
	_, _, ok := a.store.Leader()
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case ok:
		a.leaderless = time.Time{}
	case a.leaderless.IsZero():
		a.leaderless = now
	}
	return !ok && now.Sub(a.leaderless) >= astrayAfter
}

// client returns who asks. It has been verified; that this fails means that the
// certificate ran out since.
func (a *api) client(w http.ResponseWriter, r *http.Request) (certs.Identity, bool) {
	if r.TLS == nil {
		a.refuse(w, certs.Identity{}, http.StatusForbidden, failure{Reason: refusedCertificate, Error: "no certificate"})
		return certs.Identity{}, false
	}
	id, err := a.o.Identity(*r.TLS)
	if err != nil {
		a.refuse(w, certs.Identity{}, http.StatusForbidden, failure{Reason: refusedCertificate, Error: err.Error()})
		return certs.Identity{}, false
	}
	return id, true
}

func keyOf(r *http.Request, kind state.Kind) state.Key {
	return state.Key{Datacenter: r.PathValue("dc"), Kind: kind, Name: r.PathValue("name")}
}

// owns tells whether an identity is the one that an entry is about.
func owns(id certs.Identity, k state.Key) bool {
	role := certs.RoleServer
	if k.Kind == state.KindGateway {
		role = certs.RoleGateway
	}
	return id.Role == role && id.Node != "" && id.Datacenter == k.Datacenter && id.Node == k.Name
}

// primary tells whether an identity is a server of the primary.
func (a *api) primary(id certs.Identity) bool {
	return id.Role == certs.RoleServer && id.Datacenter == a.o.Datacenter
}

// refuse answers and counts a request that is not allowed, and tells who reads
// the log.
func (a *api) refuse(w http.ResponseWriter, id certs.Identity, code int, f failure) {
	a.o.Metrics.refused(f.Reason)
	if suppressed, ok := a.warned.Allow(id.String() + " " + f.Reason); ok {
		a.log.Warn("federation request refused", zap.Stringer("peer", id), zap.String("role", string(id.Role)),
			zap.String("reason", f.Reason), zap.String("detail", f.Error), zap.Int("suppressed", suppressed))
	}
	fail(w, code, f)
}

func (a *api) put(w http.ResponseWriter, r *http.Request, kind state.Kind) {
	id, ok := a.client(w, r)
	if !ok {
		return
	}
	key := keyOf(r, kind)
	if !owns(id, key) {
		a.refuse(w, id, http.StatusForbidden, failure{Reason: refusedOwner, Error: fmt.Sprintf(
			"the entry of %s is its own to write, and the certificate is of %s %s", key, id.Role, id)})
		return
	}
	reg, err := readEntry(w, r, key)
	if err == nil {
		err = reg.Check()
	}
	if err != nil {
		a.refuse(w, id, http.StatusBadRequest, failure{Reason: refusedInvalid, Error: fmt.Sprintf("the entry of %s: %v", key, err)})
		return
	}
	lease, err := a.store.Register(r.Context(), reg)
	if err != nil {
		a.failed(w, r, id, err)
		return
	}
	respond(w, Lease{Index: lease.Index, TTL: lease.TTL.String(), Warnings: lease.Warnings})
}

// A Lease is the answer to a registration, and without TTL to a removal.
type Lease struct {
	Index    uint64   `json:"index"`
	TTL      string   `json:"ttl,omitempty"` // until when it has to be renewed, such as "30s"
	Warnings []string `json:"warnings,omitempty"`
}

// readEntry reads what is registered. Whose it is, and that it lives, the body
// does not decide.
func readEntry(w http.ResponseWriter, r *http.Request, key state.Key) (state.Registration, error) {
	reg := state.Registration{Datacenter: key.Datacenter}
	body := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	if key.Kind == state.KindServer {
		reg.Server = &state.Server{}
		if err := body.Decode(reg.Server); err != nil {
			return reg, fmt.Errorf("read it: %w", err)
		}
		reg.Server.Node, reg.Server.Health, reg.Server.Since = key.Name, state.Passing, time.Time{}
	} else {
		reg.Gateway = &state.Gateway{}
		if err := body.Decode(reg.Gateway); err != nil {
			return reg, fmt.Errorf("read it: %w", err)
		}
		reg.Gateway.Name, reg.Gateway.Health, reg.Gateway.Since = key.Name, state.Passing, time.Time{}
	}
	reg.Process().Replaced = ""
	return reg, nil
}

func (a *api) remove(w http.ResponseWriter, r *http.Request, kind state.Kind) {
	id, ok := a.client(w, r)
	if !ok {
		return
	}
	key := keyOf(r, kind)
	if !owns(id, key) && !a.primary(id) {
		a.refuse(w, id, http.StatusForbidden, failure{Reason: refusedOwner, Error: fmt.Sprintf(
			"the entry of %s is its own to take away, or a server's of %s, and the certificate is of %s %s", key, a.o.Datacenter, id.Role, id)})
		return
	}
	if err := a.store.Remove(r.Context(), []state.Key{key}, true); err != nil {
		a.failed(w, r, id, err)
		return
	}
	a.log.Info("entry removed", zap.Stringer("entry", key), zap.Stringer("by", id))
	respond(w, Lease{Index: a.store.State().Index()})
}

// failed answers what the store has said no to.
func (a *api) failed(w http.ResponseWriter, r *http.Request, id certs.Identity, err error) {
	var conflict *state.ConflictError
	var elsewhere *store.NotLeaderError
	switch {
	case errors.As(err, &conflict):
		code := http.StatusConflict
		if conflict.Reason == state.ConflictLeft {
			code = http.StatusGone
		}
		a.refuse(w, id, code, failure{Reason: conflict.Reason, Error: conflict.Detail, Holder: conflict.Holder.String()})
	case errors.As(err, &elsewhere) && elsewhere.Node != "":
		w.Header().Set("Location", "https://"+certs.ServerName(elsewhere.Node, a.o.Datacenter, a.o.Domain)+r.URL.RequestURI())
		w.Header().Set(LeaderHeader, elsewhere.Address)
		fail(w, http.StatusTemporaryRedirect, failure{Error: err.Error()})
	case errors.Is(err, store.ErrNoMember):
		fail(w, http.StatusNotFound, failure{Error: err.Error()})
	case errors.Is(err, store.ErrLastVoter):
		fail(w, http.StatusConflict, failure{Error: err.Error()})
	case errors.Is(err, state.ErrFull):
		a.refuse(w, id, http.StatusInsufficientStorage, failure{Reason: refusedFull, Error: err.Error()})
	default: // no leader yet, a disk that is full
		w.Header().Set("Retry-After", "1")
		if a.alone() {
			sendElsewhere(w)
		}
		fail(w, http.StatusServiceUnavailable, failure{Error: err.Error()})
	}
}

// PeersAnswer is the answer to GET /v1/federation-peers.
type PeersAnswer struct {
	Leader string       `json:"leader"` // "" while there is none
	Peers  []store.Peer `json:"peers"`
}

// PeersHandler answers who keeps the store.
func PeersHandler(s Store) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		leader, _, _ := s.Leader()
		respond(w, PeersAnswer{leader, s.Peers()})
	})
}

func (a *api) peers(w http.ResponseWriter, r *http.Request) { PeersHandler(a.store).ServeHTTP(w, r) }

func (a *api) removePeer(w http.ResponseWriter, r *http.Request) {
	if id, ok := a.member(w, r); ok {
		if err := a.store.RemovePeer(r.Context(), r.PathValue("node")); err != nil {
			a.failed(w, r, id, err)
			return
		}
		a.log.Info("peer removed from the store", zap.String("node", r.PathValue("node")), zap.Stringer("by", id))
		respond(w, struct{}{})
	}
}

// member lets servers of the primary alone go on.
func (a *api) member(w http.ResponseWriter, r *http.Request) (certs.Identity, bool) {
	id, ok := a.client(w, r)
	if ok && !a.primary(id) {
		a.refuse(w, id, http.StatusForbidden, failure{Reason: refusedOwner, Error: fmt.Sprintf(
			"only servers of %s may do that, and the certificate is of %s %s", a.o.Datacenter, id.Role, id)})
		return id, false
	}
	return id, ok
}

func (a *api) greet(w http.ResponseWriter, r *http.Request) {
	if _, ok := a.member(w, r); ok {
		respond(w, a.store.Greeting())
	}
}

func (a *api) promise(w http.ResponseWriter, r *http.Request) {
	if _, ok := a.member(w, r); !ok {
		return
	}
	var p store.Proposal
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&p); err != nil {
		fail(w, http.StatusBadRequest, failure{Error: "read the proposal: " + err.Error()})
		return
	}
	if err := a.store.Promise(p); err != nil {
		fail(w, http.StatusConflict, failure{Error: err.Error()})
		return
	}
	respond(w, struct{}{})
}

func respond(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(v) // the client has gone: nothing to do
}
