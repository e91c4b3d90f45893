package certs

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// maxSessions bounds the sessions that a [Source] keeps to resume, one for each server name.
const maxSessions = 512

// Options say where the certificates of a [Source] are.
type Options struct {
	CAFile   string // one CA certificate or more, PEM: while a CA is replaced, the old and the new
	CertFile string // own certificate, PEM, followed by intermediate ones if there are any
	KeyFile  string // its private key, PEM, PKCS #8, SEC 1 or PKCS #1
	Domain   string // the domain of the names, such as "consul"

	Now     func() time.Time // the clock; nil is time.Now
	Log     *zap.Logger      // nil is none
	Metrics *Metrics         // nil is none
}

// A Source holds the certificates of one process, and makes TLS configurations
// that use the ones loaded last.
type Source struct {
	opts    Options
	log     *zap.Logger
	current atomic.Pointer[generation]
}

// A generation is the certificates of one load. It never changes. The session
// tickets given out and kept go with it: after a Reload each peer is verified anew, by the
// new CA, and shown the new certificate.
type generation struct {
	trust    trust
	chain    []*x509.Certificate // leaf first
	cert     tls.Certificate
	identity Identity
	notAfter time.Time // of the longest lasting path from the leaf to a CA
	sessions tls.ClientSessionCache
}

// Load reads the files and checks them, each by itself and together. The error
// names every fault found, in the words of [Check].
func Load(o Options) (*Source, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(nil)
	}
	s := &Source{opts: o, log: o.Log.Named("certs")}
	g, err := s.load()
	if err != nil {
		return nil, err
	}
	s.use(g)
	return s, nil
}

// Reload reads the files again. If anything is wrong with them, or they make
// this process another identity, the old certificates stay in use and
// the error says why. Otherwise the new ones are used from the call of use on, so
// that other parts can be asked before. Connections that are up stay up.
func (s *Source) Reload() (use func(), err error) {
	g, err := s.load()
	if err == nil && g.identity != s.Identity() {
		err = &loadError{{
			Field:   FieldCert,
			Summary: fmt.Sprintf("%s is of %s %s, but %s %s runs", s.opts.CertFile, g.identity.Role, g.identity, s.Identity().Role, s.Identity()),
			Hint:    "restart to run as another node",
		}}
	}
	if err != nil {
		s.opts.Metrics.failed.Inc()
		return nil, err
	}
	return func() {
		s.opts.Metrics.ok.Inc()
		s.use(g)
	}, nil
}

func (s *Source) load() (*generation, error) {
	l := &loader{ca: s.opts.CAFile, cert: s.opts.CertFile, key: s.opts.KeyFile, domain: s.opts.Domain, now: s.opts.Now()}
	g := l.load()
	if len(l.problems) > 0 {
		return nil, new(loadError(l.problems))
	}
	return g, nil
}

func (s *Source) use(g *generation) {
	s.current.Store(g)
	s.opts.Metrics.set(g)
	s.log.Info("certificates loaded", zap.Stringer("identity", g.identity), zap.String("role", string(g.identity.Role)),
		zap.Time("not_after", g.notAfter))
}

// Identity returns who this process is.
func (s *Source) Identity() Identity { return s.current.Load().identity }

// NotAfter returns when the own certificate, or the last CA that it leads to,
// expires.
func (s *Source) NotAfter() time.Time { return s.current.Load().notAfter }

// Valid tells whether a peer with the same CA would take the own certificate at
// a time; the error is a [*PeerError].
func (s *Source) Valid(now time.Time) error {
	g := s.current.Load()
	_, err := g.trust.verify(g.chain, x509.ExtKeyUsageServerAuth, now)
	return err
}

// ServerConfig returns a configuration for inbound connections. It asks for a
// certificate and takes the connection only if that leads to the CA, is valid now
// and for client authentication, and has an identity that admit lets in.
// Otherwise the handshake fails with a [*PeerError]. Each connection uses the
// certificates loaded last.
//
// admit is called within the handshake, of a resumed session too, with the
// protocol that was negotiated: a ticket that was given for one protocol is worth
// nothing for another. The protocol is empty where there is none, as for an
// http/1.1 client where protos has h2 (crypto/tls lets that in). An error of
// admit fails the handshake as it is. admit may be called from any goroutine and
// must not be nil.
//
// The request names no CAs: Go's clients would withhold a certificate of
// another one, and nothing could be said about it.
func (s *Source) ServerConfig(protos []string, admit func(protocol string) (Admission, error)) *tls.Config {
	c := &serverConfigs{source: s, protos: slices.Clone(protos), admit: admit}
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		NextProtos:                  c.protos,
		DynamicRecordSizingDisabled: true,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return c.at(s.current.Load()), nil
		},
	}
}

// serverConfigs keeps the configuration of the generation in use: session
// tickets can be resumed only within one tls.Config.
type serverConfigs struct {
	source *Source
	protos []string
	admit  func(protocol string) (Admission, error)

	mu     sync.Mutex
	of     *generation
	config *tls.Config
}

func (c *serverConfigs) at(g *generation) *tls.Config {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of == g {
		return c.config
	}
	config := &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Time:         c.source.opts.Now,
		NextProtos:   c.protos,
		Certificates: []tls.Certificate{g.cert},
		// Not RequireAnyClientCert: crypto/tls would refuse a client without one
		// before VerifyConnection can say so. There it is refused all the same.
		ClientAuth: tls.RequestClientCert,
		VerifyConnection: func(cs tls.ConnectionState) error {
			return c.source.verifyClient(cs, c.admit)
		},
		// One write is one record: receivers exist that lose what follows in it.
		DynamicRecordSizingDisabled: true,
	}
	// crypto/tls seals tickets with the keys of the configuration that
	// GetConfigForClient was called on, which stay the same over a reload. These
	// use the generation's own, which crypto/tls makes and renews each day.
	config.WrapSession, config.UnwrapSession = config.EncryptTicket, config.DecryptTicket
	c.of, c.config = g, config
	return config
}

// ClientConfig returns a configuration for outbound connections to one server:
// it shows the own certificate and takes the connection only if the server's
// leads to the CA, is valid now and for server authentication, carries the whole
// of serverName, and has an identity that agrees with it. Otherwise the handshake
// fails with a [*PeerError]. Each connection uses the certificates loaded last.
func (s *Source) ClientConfig(serverName string, protos []string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		Time:       s.opts.Now,
		ServerName: serverName,
		NextProtos: slices.Clone(protos),
		// Whatever CAs the server names: it is to see what we have and say what is wrong with it.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &s.current.Load().cert, nil
		},
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection does all of it, on resumption too
		VerifyConnection: func(cs tls.ConnectionState) error {
			return s.verifyServer(cs, serverName)
		},
		ClientSessionCache:          sessionCache{s},
		DynamicRecordSizingDisabled: true,
	}
}

// A sessionCache is that of the generation in use. A ticket that arrives over a
// connection from before a Reload may get into the next one's; it does no
// harm, as both sides verify again on resumption.
type sessionCache struct{ source *Source }

func (c sessionCache) Get(key string) (*tls.ClientSessionState, bool) {
	return c.source.current.Load().sessions.Get(key)
}

func (c sessionCache) Put(key string, session *tls.ClientSessionState) {
	c.source.current.Load().sessions.Put(key, session)
}

// PeerIdentity returns who is at the other end of a connection that a
// configuration of s has verified. The error is a [*PeerError].
func (s *Source) PeerIdentity(cs tls.ConnectionState) (Identity, error) {
	if len(cs.PeerCertificates) == 0 {
		_, err := s.current.Load().trust.verify(nil, x509.ExtKeyUsageAny, s.opts.Now())
		return Identity{}, err
	}
	return IdentityOf(cs.PeerCertificates[0], s.opts.Domain)
}

func (s *Source) verifyClient(cs tls.ConnectionState, admit func(protocol string) (Admission, error)) error {
	chain := cs.PeerCertificates
	if err := s.current.Load().trust.admit(chain, x509.ExtKeyUsageClientAuth, s.opts.Now()); err != nil {
		return err
	}
	id, err := IdentityOf(chain[0], s.opts.Domain)
	if err != nil {
		return err
	}
	admission, err := admit(cs.NegotiatedProtocol)
	if err != nil {
		return err
	}
	return admission.check(s.Identity(), id, chain[0])
}

func (s *Source) verifyServer(cs tls.ConnectionState, serverName string) error {
	chain := cs.PeerCertificates
	if err := s.current.Load().trust.admit(chain, x509.ExtKeyUsageServerAuth, s.opts.Now()); err != nil {
		return err
	}
	id, err := IdentityOf(chain[0], s.opts.Domain)
	if err != nil {
		return err
	}
	// The identity is compared as well: a wildcard such as *.dc1.consul, which is
	// outside the scheme, would fit server.dc1.consul.
	wanted, err := ParseName(serverName, s.opts.Domain)
	if err != nil || !id.agrees(wanted) || chain[0].VerifyHostname(serverName) != nil {
		return &PeerError{Reason: ReasonNameMismatch, Wanted: "name " + serverName, Found: describe(chain[0])}
	}
	return nil
}
