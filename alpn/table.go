package alpn

import (
	"crypto/tls"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"culvert/certs"
)

// The protocols of the federation, which belong to no service. A [Table] has
// those that it is told to have.
const (
	Raft = "culvert/raft/1" // hashicorp/raft's transport, within one datacenter
	HTTP = "h2"             // HTTP/2, the federation API
)

// Session is the protocol of a connection that carries streams of all services. A
// [Table] has it if it is told to.
const Session = "culvert/session/1"

// A Kind says how the bytes after the handshake are to be read.
type Kind int

// The kinds of service, and those of [Raft] and [HTTP].
const (
	KindPacket  Kind = iota + 1 // frames, each one datagram
	KindStream                  // the bytes of one TCP connection
	KindRaft                    // raft's messages
	KindHTTP                    // HTTP/2
	KindSession                 // streams of any service
)

// String returns "packet", "stream", "raft", "http" or "session".
func (k Kind) String() string {
	switch k {
	case KindPacket:
		return "packet"
	case KindStream:
		return "stream"
	case KindRaft:
		return "raft"
	case KindHTTP:
		return "http"
	case KindSession:
		return "session"
	}
	return fmt.Sprintf("kind %d", int(k))
}

// prefix is Culvert's own protocol name up to the service.
func (k Kind) prefix() string { return "culvert/" + k.String() + "/1/" }

// lasting tells whether connections of the kind do not end by themselves, so that
// a drain must not wait for them. A session is told of the drain by its handler,
// and ends with its last stream.
func (k Kind) lasting() bool { return k != KindStream && k != KindSession }

// admission says from whom connections of the kind are taken. Packets and streams
// come from servers anywhere, and what they may reach is decided behind.
func (k Kind) admission() certs.Admission {
	a := certs.Admission{Roles: []certs.Role{certs.RoleServer}}
	switch k {
	case KindRaft:
		a.SameDatacenter = true // its voters are the sidecars of one
	case KindHTTP:
		a.Roles = append(a.Roles, certs.RoleGateway)
	}
	return a
}

// A Service is one entry of a [Table].
type Service struct {
	Name string // [a-z0-9-]{1,63}
	Kind Kind
	ALPN string // a name known outside Culvert that means the same, such as consul/wan-gossip/packet; optional
	// Types are those of a stream whose first byte tells what it is. It has no
	// ALPN then.
	Types []Type
}

// A Route is what a negotiated protocol means.
type Route struct {
	Protocol string // as negotiated
	Service  string // Service.Name; empty for [Raft], [HTTP] and [Session]
	Kind     Kind
	Native   bool // a service's name from outside Culvert: one frame is one TLS record, and frames go one way
	// Type is what the protocol tells of the connection, whose bytes begin
	// behind the type's. Nil where it tells nothing: of Culvert's own names and
	// of services without types.
	Type *Type
}

// A Table maps protocol names to services and back. It is immutable and may be
// used from any goroutine.
type Table struct {
	protocols []string
	routes    map[string]Route
	offers    map[string][]string
	types     map[typeKey]string // the native name of a service's type
}

type typeKey struct {
	service string
	first   byte
}

// maxProtocol is the length limit of RFC 7301 section 3.1, in bytes.
const maxProtocol = 255

// NewTable builds a Table of services and of other protocols, [Session], [Raft] or
// [HTTP], of which there must be one at least. Two services of one name, or of
// one ALPN name, are an error, and so is an ALPN name that is Culvert's own.
func NewTable(services []Service, others ...string) (*Table, error) {
	t := &Table{routes: make(map[string]Route), offers: make(map[string][]string), types: make(map[typeKey]string)}
	valid := regexp.MustCompile(`^[a-z0-9-]{1,63}$`)
	var native []string
	for _, s := range services {
		if !valid.MatchString(s.Name) {
			return nil, fmt.Errorf("service name %q: want 1 to 63 of a-z, 0-9 and -", s.Name)
		}
		if s.Kind != KindPacket && s.Kind != KindStream {
			return nil, fmt.Errorf("service %q: %v is neither packet nor stream", s.Name, s.Kind)
		}
		if _, taken := t.offers[s.Name]; taken {
			return nil, fmt.Errorf("service %q: given twice", s.Name)
		}
		own := s.Kind.prefix() + s.Name
		t.routes[own] = Route{Protocol: own, Service: s.Name, Kind: s.Kind}
		t.protocols = append(t.protocols, own)
		t.offers[s.Name] = []string{own}
		names, err := t.addNatives(s)
		if err != nil {
			return nil, fmt.Errorf("service %q: %w", s.Name, err)
		}
		native = append(native, names...)
	}
	if err := t.addOthers(others); err != nil {
		return nil, err
	}
	if _, ok := t.routes[Session]; ok {
		t.protocols = slices.Insert(t.protocols, 0, Session)
	}
	if len(t.routes) == 0 {
		// An empty list would make crypto/tls negotiate nothing and accept it.
		return nil, errors.New("no service and no protocol")
	}
	if _, ok := t.routes[Raft]; ok {
		t.protocols = append(t.protocols, Raft)
	}
	t.protocols = append(t.protocols, native...)
	if _, ok := t.routes[HTTP]; ok {
		t.protocols = append(t.protocols, HTTP)
	}
	return t, nil
}

func (t *Table) addOthers(protocols []string) error {
	for _, p := range protocols {
		switch p {
		case Session:
			t.routes[p] = Route{Protocol: p, Kind: KindSession}
		case Raft:
			t.routes[p] = Route{Protocol: p, Kind: KindRaft}
		case HTTP:
			t.routes[p] = Route{Protocol: p, Kind: KindHTTP}
		default:
			return fmt.Errorf("protocol %q: neither %s nor %s nor %s", p, Session, Raft, HTTP)
		}
	}
	return nil
}

// addNatives adds a service's names from outside Culvert and returns them.
func (t *Table) addNatives(s Service) ([]string, error) {
	switch {
	case len(s.Types) > 0 && (s.Kind != KindStream || s.ALPN != ""):
		return nil, errors.New("types are for streams without an alpn name of their own")
	case s.ALPN != "":
		t.offers[s.Name] = append(t.offers[s.Name], s.ALPN)
		return []string{s.ALPN}, t.addNative(Route{Protocol: s.ALPN, Service: s.Name, Kind: s.Kind, Native: true})
	}
	var names []string
	for _, typ := range s.Types {
		key := typeKey{s.Name, typ.Byte}
		if _, taken := t.types[key]; taken {
			return nil, fmt.Errorf("type byte %d: given twice", typ.Byte)
		}
		if err := t.addNative(Route{Protocol: typ.ALPN, Service: s.Name, Kind: s.Kind, Native: true, Type: &typ}); err != nil {
			return nil, fmt.Errorf("type byte %d: %w", typ.Byte, err)
		}
		t.types[key] = typ.ALPN
		names = append(names, typ.ALPN)
	}
	return names, nil
}

func (t *Table) addNative(r Route) error {
	switch taken, ok := t.routes[r.Protocol]; {
	case r.Protocol == "":
		return errors.New("alpn name: empty")
	case len(r.Protocol) > maxProtocol:
		return fmt.Errorf("alpn name of %d bytes: at most %d", len(r.Protocol), maxProtocol)
	case strings.HasPrefix(r.Protocol, "culvert/"):
		return fmt.Errorf("alpn name %q: culvert/ names are Culvert's own", r.Protocol)
	case r.Protocol == "h2", strings.HasPrefix(r.Protocol, "http/"):
		return fmt.Errorf("alpn name %q: HTTP is no service", r.Protocol)
	case ok:
		return fmt.Errorf("alpn name %q: taken by service %q", r.Protocol, taken.Service)
	}
	t.routes[r.Protocol] = r
	return nil
}

// Protocols returns every name, in the order in which an acceptor prefers them:
// Culvert's own first, [HTTP] last. The slice is the caller's.
func (t *Table) Protocols() []string { return slices.Clone(t.protocols) }

// Lookup returns the route of a protocol name. The empty name has none.
func (t *Table) Lookup(protocol string) (Route, bool) {
	r, ok := t.routes[protocol]
	return r, ok
}

// negotiated returns the route of a connection whose handshake is done.
func (t *Table) negotiated(c *tls.Conn) (Route, error) {
	protocol := c.ConnectionState().NegotiatedProtocol
	r, ok := t.routes[protocol]
	if !ok {
		return Route{}, &protocolError{negotiated: protocol}
	}
	return r, nil
}

// Offer returns what to offer when dialling a service, Culvert's own name first,
// and nil for a service that the table lacks. The slice is the caller's.
func (t *Table) Offer(service string) []string { return slices.Clone(t.offers[service]) }

// A StreamOffer is what a stream is dialled for.
type StreamOffer struct {
	// Service is the stream's. With none it is for a session alone.
	Service string
	// First is the byte that a connection of a service with types begins with. For
	// one that no native server knows by a protocol none of theirs is offered. Nil
	// for services without types.
	First *byte
	// Session offers to carry the stream on a session.
	Session bool
}

// OfferStream is Offer for a stream.
func (t *Table) OfferStream(o StreamOffer) []string {
	var offer []string
	if _, ok := t.routes[Session]; ok && o.Session {
		offer = append(offer, Session)
	}
	if o.Service == "" {
		return offer
	}
	names, ok := t.offers[o.Service]
	if !ok {
		return nil
	}
	offer = append(offer, names...)
	if o.First != nil {
		if native, ok := t.types[typeKey{o.Service, *o.First}]; ok {
			offer = append(offer, native)
		}
	}
	return offer
}

// offerProtocol is Offer for a federation protocol. The two are not one map:
// h2 is a name that a service may have.
func (t *Table) offerProtocol(protocol string) []string {
	if r, ok := t.routes[protocol]; ok && r.Service == "" && r.Kind != KindSession {
		return []string{protocol}
	}
	return nil
}

// admission says from whom a negotiated protocol is taken. One without a route,
// as the empty one, is an error. With h2 in the list crypto/tls negotiates that
// with an http/1.1 client.
func (t *Table) admission(protocol string) (certs.Admission, error) {
	r, ok := t.routes[protocol]
	if !ok {
		return certs.Admission{}, &protocolError{negotiated: protocol}
	}
	a := r.Kind.admission()
	a.SameDatacenter = a.SameDatacenter || r.Type != nil && r.Type.SameDatacenter
	return a, nil
}
