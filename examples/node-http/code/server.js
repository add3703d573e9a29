'use strict';

const http = require('node:http');

const server = http.createServer(async (req, res) => {
  const { pathname, searchParams } = new URL(req.url, 'http://localhost');

  if (pathname === '/hello') {
    let body = '';
    for await (const part of req) body += part;
    const name = searchParams.get('name') || nameIn(body) || 'world';
    return send(res, 200, { hello: name, node: process.version, pid: process.pid });
  }
  if (pathname === '/echo') {
    // Both ways at once: each part goes back as it comes.
    res.writeHead(200, { 'content-type': req.headers['content-type'] || 'application/octet-stream' });
    return req.pipe(res);
  }
  if (pathname === '/headers') return send(res, 200, req.headers);
  return send(res, 404, { error: `there is no ${pathname}; try /hello, /echo or /headers` });
});

function nameIn(body) {
  try {
    return JSON.parse(body).name;
  } catch {
    return undefined;
  }
}

function send(res, status, value) {
  const body = JSON.stringify(value) + '\n';
  res.writeHead(status, { 'content-type': 'application/json', 'content-length': Buffer.byteLength(body) });
  res.end(body);
}

// poold keeps its connections; the server need not close them when they rest.
server.keepAliveTimeout = 0;
server.listen(Number(process.env.PORT) || 8080, '0.0.0.0');
