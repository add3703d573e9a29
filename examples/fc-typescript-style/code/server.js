'use strict';
// What a server in TypeScript compiles to: it answers on any path, prints the platform's log markers, and listens on 9000.

const http = require('http');

const server = http.createServer((req, res) => {
  const rid = req.headers['x-fc-request-id'];
  console.log(`FC Invoke Start RequestId: ${rid}`);
  let event = '';
  req.on('data', (part) => {
    event += part;
  });
  req.on('end', () => {
    console.log(event);
    res.writeHead(200);
    res.end(event);
    console.log(`FC Invoke End RequestId: ${rid}`);
  });
});

server.timeout = 0; // no limit on a connection's rest
server.keepAliveTimeout = 0;
server.listen(9000, '0.0.0.0', () => {
  console.log('FunctionCompute typescript runtime inited.');
});
