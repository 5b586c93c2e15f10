// A libp2p node that shares no code with ours: dials, identifies and pings, then listens until stdin ends.
import { createLibp2p } from 'libp2p'
import { tcp } from '@libp2p/tcp'
import { noise } from '@chainsafe/libp2p-noise'
import { plaintext } from '@libp2p/plaintext'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import { ping } from '@libp2p/ping'
import { multiaddr } from '@multiformats/multiaddr'

// Node 20 does not have it yet, and js-libp2p asks for it.
Promise.withResolvers ??= () => {
  const deferred = {}
  deferred.promise = new Promise((resolve, reject) => Object.assign(deferred, { resolve, reject }))
  return deferred
}

const [address, security] = process.argv.slice(2)
const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [security === 'plaintext' ? plaintext() : noise()],
  streamMuxers: [yamux()],
  services: { identify: identify(), ping: ping() }
})
const say = (value) => process.stdout.write(JSON.stringify(value) + '\n')
try {
  const identified = new Promise((resolve) => node.addEventListener('peer:identify', resolve, { once: true }))
  const connection = await node.dial(multiaddr(address), { signal: AbortSignal.timeout(10000) })
  const seen = (await identified).detail
  const milliseconds = await node.services.ping.ping(connection.remotePeer)
  say({
    peer: connection.remotePeer.toString(),
    encryption: connection.encryption,
    protocols: seen.protocols,
    listens: seen.listenAddrs.map(String),
    milliseconds
  })
} catch (error) {
  say({ error: error.name, text: error.message })
}
say({ self: node.getMultiaddrs().map(String) })
process.stdin.resume()
process.stdin.on('end', async () => { await node.stop(); process.exit(0) })
